"""BDPO's mixture, BPO's alpha and link: 48 policies from one scoring pass."""
