"""How many tokens a model has positions for: a longer row is left out or refused, and never cut in silence."""

from typing import Any

# transformers maps the names of other architectures (n_positions, ...) to the first; MPT has the second.
NAMES = ("max_position_embeddings", "max_seq_len")


def positions_of(config: Any) -> int | None:
    """The tokens that a configuration has positions for; None where it has no limit (Mamba, ALiBi) or does not say.

    With scaled rotary positions the configuration's own figure holds. A multimodal model's is that of its language
    model; anything but a transformers configuration has none.
    """
    if not hasattr(config, "get_text_config"):
        return None
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in NAMES)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
