"""What binds the form of an answer: OpenAI's `response_format`, and vLLM's `structured_outputs`."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, from_json

from deployments.errors import field_error
from deployments.grammars.bounds import (
    OUTPUTS,
    check_choices,
    check_regex,
    check_schema,
)
from deployments.model_settings import StrictModel
from deployments.parameters.values import (
    Flag,
    Free,
    Listed,
    Text,
    Unsupported,
    short,
    small,
)
from policies.capabilities import Capability

MAX_SCHEMA = 32_000  # characters of JSON


def _compilable(named: dict[str, object]) -> dict[str, object]:
    """Refuse a `json_schema` whose schema an engine would compile for minutes, or fail to compile."""
    try:
        check_schema(short(named, MAX_SCHEMA))
    except ValueError as error:
        if "schema" not in named:
            raise
        # the error is at the schema itself
        problem = InitErrorDetails(
            type=PydanticCustomError("value_error", "{why}", {"why": str(error)}),
            loc=("schema",),
            input=None,
        )
        raise ValidationError.from_exception_data("json_schema", [problem]) from None
    return named


def _schema_object(value: object) -> object:
    """A JSON schema that is a text becomes an object, so that it is bounded as one."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_SCHEMA:
        raise ValueError(f"is longer than {MAX_SCHEMA} characters; send less")
    try:
        return from_json(value, cache_strings="none")
    except ValueError:
        raise ValueError("is no JSON; send a JSON schema as an object") from None


def _bounded(schema: dict[str, object]) -> dict[str, object]:
    check_schema(short(small(schema), MAX_SCHEMA))
    return schema


def _regex(pattern: str) -> str:
    check_regex(pattern)
    return pattern


def _choices(choices: list[str]) -> list[str]:
    check_choices(choices)
    return choices


class ResponseFormat(StrictModel):
    """Text, any JSON, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[Free, AfterValidator(_compilable)] | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if self.type != "json_schema":
            return self
        if self.json_schema is None:
            raise field_error(
                "json_schema", "is missing; the format json_schema needs it"
            )
        if not isinstance(self.json_schema.get("name"), str):
            raise field_error("json_schema.name", "is missing; name the schema")
        if not isinstance(self.json_schema.get("schema"), dict):
            raise field_error(
                "json_schema.schema",
                "is missing or no object; send a JSON schema, or use the format json_object",
            )
        return self

    @property
    def capability(self) -> Capability | None:
        """What the format needs of an arm; None for text."""
        if self.type == "text":
            return None
        return Capability(self.type)


class StructuredOutputs(StrictModel):
    """vLLM's: the answer is JSON of a schema, a text that a regular expression matches, or one of several texts."""

    model_config = ConfigDict(serialize_by_alias=True)

    json_: (
        Annotated[
            dict[str, object], BeforeValidator(_schema_object), AfterValidator(_bounded)
        ]
        | None
    ) = Field(None, alias="json", description="A JSON schema, or one as a text.")
    regex: Annotated[Text, AfterValidator(_regex)] | None = None
    choice: (
        Annotated[Listed[str], Field(min_length=1), AfterValidator(_choices)] | None
    ) = None
    json_object: Flag | None = None
    disable_any_whitespace: Flag | None = None
    disable_additional_properties: Flag | None = None
    grammar: Annotated[
        None,
        BeforeValidator(
            Unsupported(
                "for some grammars of a few characters an engine takes seconds a token; send json, regex or choice"
            )
        ),
    ] = Field(None, exclude=True)
    whitespace_pattern: Annotated[
        None,
        BeforeValidator(Unsupported("write the white space into regex")),
    ] = Field(None, exclude=True)
    structural_tag: Annotated[
        None, BeforeValidator(Unsupported("send tools or regex"))
    ] = Field(None, exclude=True)

    @model_validator(mode="after")
    def _check_kinds(self) -> "StructuredOutputs":
        if self.json_object is False:
            self.json_object = None
        given = [self.json_, self.regex, self.choice, self.json_object]
        if sum(value is not None for value in given) != 1:
            kinds = ", ".join((*OUTPUTS, "json_object"))
            raise ValueError(f"has one of {kinds}; send exactly one")
        return self

    @property
    def capability(self) -> Capability:
        """What it needs of an arm."""
        if self.json_object:
            return Capability.JSON_OBJECT
        return Capability.JSON_SCHEMA
