"""The prompts of a run and their sources."""

from loopfast.prompts.sources import Prompt, PromptList, as_prompts, load_prompts

__all__ = ["Prompt", "PromptList", "as_prompts", "load_prompts"]
