"""Networks that people have, small, and what of each must be fused: ``ARCHITECTURES``, one row each.

Written from the public architectures: kernel sizes, pads, strides, norms and the ways to spell them are those
of the networks; widths are arguments. One file a family.
"""

from architectures import (
    anime_gan,
    attention_transfer,
    block_variants,
    cartoon_gan,
    concatenating,
    feature_decoders,
    hand_written_norms,
    image_translation,
    msg_net,
    munit,
    reconet,
    stargan,
    tensorflow_net,
    transformer_net,
    ugatit,
    white_box,
)
from architectures.row import Architecture

_FAMILIES = (
    transformer_net, hand_written_norms, tensorflow_net, reconet, block_variants, concatenating, msg_net,
    image_translation, cartoon_gan, ugatit, munit, stargan, anime_gan, white_box, feature_decoders,
    attention_transfer,
)  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {row.name: row for family in _FAMILIES for row in family.ROWS}
