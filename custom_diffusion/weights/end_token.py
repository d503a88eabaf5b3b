"""Where a text encoder takes its pooled features from, once there are new words.

Text encoders whose configuration says `eos_token_id: 2`, which is wrong and very common, take them from the largest token id
of a prompt. Without new words that is the end token; but a new word's id is larger still. A1111, ComfyUI and kohya pool at the
end token whatever the prompt, and so must whoever trains or draws here.
"""

from torch import nn


def pool_at(text_encoder: nn.Module, end_token_id: int) -> int:
    """Let the encoder pool at the first `end_token_id` of a prompt, and say so in its configuration.

    Returns:
        The id that it went by before, with which a second call undoes this one.
    """
    before = text_encoder.config.eos_token_id
    for module in text_encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end_token_id
    text_encoder.config.eos_token_id = end_token_id
    return before
