"""A contextual bandit whose policy can't represent the reward: DPO, AuxDPO, sketched constraints."""
