"""The prompts of a run, and where they come from."""

from loopfast.prompts.sources import Prompt, PromptList, load_prompts

__all__ = ["Prompt", "PromptList", "load_prompts"]
