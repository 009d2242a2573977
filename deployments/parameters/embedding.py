"""The parameters of a request for embeddings."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from deployments.dispatch.admission import NORMAL, RANKS
from deployments.model_settings import StrictModel
from deployments.parameters.generation import Texts
from deployments.parameters.needs import Need
from deployments.parameters.values import Listed, Text, Whole
from deployments.parameters.wishes import Wishes


def _no_tokens(value: object) -> object:
    """Refuse token ids: the client made them with the tokenizer of another model."""
    if isinstance(value, list) and any(isinstance(item, int | list) for item in value):
        raise ValueError(
            "send text rather than token ids (LangChain: check_embedding_ctx_length=False)"
        )
    return value


class EmbeddingRequest(StrictModel):
    """POST /v1/embeddings."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    input: Annotated[
        Annotated[Text, StringConstraints(min_length=1)]
        | Annotated[
            Listed[Annotated[Text, StringConstraints(min_length=1)]],
            Field(min_length=1, max_length=2048),
        ],
        BeforeValidator(_no_tokens),
    ]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Whole | None = Field(None, ge=1, le=1_000_000)
    user: str | None = Field(None, max_length=512, exclude=True)

    stream: Literal[False] | None = Field(False, exclude=True)
    router: Wishes | None = None

    def users(self) -> list[str]:
        """See GenerationRequest."""
        return [self.user] if self.user else []

    def rank(self) -> int:
        """See GenerationRequest."""
        if self.router is None or self.router.priority is None:
            return NORMAL
        return RANKS[self.router.priority]

    def limit(self) -> int:
        """See GenerationRequest."""
        return 0

    def texts(self) -> Texts:
        """See Texts."""
        text = self.input if isinstance(self.input, str) else "\n".join(self.input)
        return Texts(text, text)

    def needs(self) -> list[Need]:
        """See GenerationRequest."""
        return []

    @property
    def token_list(self) -> str | None:
        """See EngineParameters."""
        return None

    def body(self) -> dict[str, object]:
        """See GenerationRequest."""
        return self.model_dump(exclude_none=True, exclude={"model", "router"})
