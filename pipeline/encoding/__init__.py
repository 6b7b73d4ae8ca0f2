"""Prompts and responses, as dialogues or plain text -> token ids."""
