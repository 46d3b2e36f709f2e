"""What a recipe can say about text: one source, or several mixed by weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Discriminator, Field, RootModel, Tag, model_validator

from .section import Section

TAGS = ("one", "mixture")  # stand in pydantic's locations where the recipe has no key


class TextSpec(Section):
    """Where training text comes from: exactly one of the embedded text, a hub dataset or local files.

    Written short, `embedded` means the text inside the package and any other string a file or glob pattern
    (.txt, .jsonl, .parquet; plain or .zst).
    """

    embedded: bool = False
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    column: str = "text"
    files: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"embedded": True} if value == "embedded" else {"files": (value,)}
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum((self.embedded, self.hub is not None, bool(self.files))) != 1:
            raise ValueError("say exactly one of: embedded, hub, files")
        if self.hub is None and (self.config is not None or self.split != "train"):
            raise ValueError("config and split go with hub")
        if self.embedded and self.column != "text":
            raise ValueError("column goes with hub or files")
        return self

    @property
    def parts(self) -> tuple[tuple[TextSpec, float], ...]:
        """The sources with their shares of the tokens."""
        return ((self, 1.0),)

    def describe(self) -> str:
        """One line that names the text, for tables and provenance."""
        if self.embedded:
            return "embedded"
        return f"hub:{self.hub}" + (f"/{self.config}" if self.config else "") if self.hub else " ".join(self.files)


class WeightedText(TextSpec):
    """A source of a mixture; its share of the tokens is its weight over the sum of all weights."""

    weight: float = Field(1.0, gt=0)


class TextMixture(RootModel[tuple[WeightedText, ...]]):
    """Several sources: a list whose elements say what a text says, and a `weight` (1 where it is left out)."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.root:
            raise ValueError("name at least one text")
        return self

    @property
    def parts(self) -> tuple[tuple[TextSpec, float], ...]:
        """The sources with their shares of the tokens."""
        total = sum(source.weight for source in self.root)
        return tuple((source, source.weight / total) for source in self.root)

    def describe(self) -> str:
        """One line that names the sources with their shares, for tables and provenance."""
        return " + ".join(f"{share:.3g} {source.describe()}" for source, share in self.parts)


Text = Annotated[
    Annotated[TextSpec, Tag("one")] | Annotated[TextMixture, Tag("mixture")],
    Discriminator(lambda value: "one" if isinstance(value, str | Mapping | TextSpec) else "mixture"),
]
