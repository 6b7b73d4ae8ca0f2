"""Where objectives move probability: four prompts, four responses, a small network."""
