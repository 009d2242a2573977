"""What a request may need of an arm, beyond its task, its context and its limits.

A profile says what a request needs (`TaskProfile.needs`), a state what an arm lacks (`ModelState.lacks`). Both hold
plain names, because journals and the messages between processes do.
"""

from enum import StrEnum


class Capability(StrEnum):
    """An ability that some arms have.

    TOOLS: calls tools where it sees fit. FORCED_TOOLS: can be made to call one. PARALLEL_TOOLS: calls several at once.
    JSON_OBJECT, JSON_SCHEMA: its engine lets it write JSON only, or JSON of a schema or another grammar.
    LOGPROBS: returns the probabilities of tokens. IMAGES, AUDIO, VIDEO: takes these in messages. THINKING: thinks
    before it answers, and returns that apart from the answer. VLLM_PARAMETERS: its engine takes the parameters that
    vLLM has and OpenAI's API has not.
    """

    TOOLS = "tools"
    FORCED_TOOLS = "forced_tools"
    PARALLEL_TOOLS = "parallel_tools"
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    LOGPROBS = "logprobs"
    IMAGES = "images"
    AUDIO = "audio"
    VIDEO = "video"
    THINKING = "thinking"
    VLLM_PARAMETERS = "vllm_parameters"

    @property
    def words(self) -> str:
        """What an arm without it cannot do."""
        return _WORDS[self]


# Decision records hold them, in the sentence of constraints.Exclusion.CAPABILITY.
_WORDS = {
    Capability.TOOLS: "call tools",
    Capability.FORCED_TOOLS: "be made to call a tool",
    Capability.PARALLEL_TOOLS: "call several tools at once",
    Capability.JSON_OBJECT: "be held to JSON",
    Capability.JSON_SCHEMA: "be held to a schema",
    Capability.LOGPROBS: "return log probabilities",
    Capability.IMAGES: "read images",
    Capability.AUDIO: "listen to audio",
    Capability.VIDEO: "watch videos",
    Capability.THINKING: "think before it answers",
    Capability.VLLM_PARAMETERS: "take parameters of vLLM",
}

# What is no text in a message, as the names that profiles and states hold.
MEDIA = frozenset(
    medium.value for medium in (Capability.IMAGES, Capability.AUDIO, Capability.VIDEO)
)
