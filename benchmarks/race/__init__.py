"""The race: TRL's DDPOTrainer against loopfast, each in its own environment and process."""
