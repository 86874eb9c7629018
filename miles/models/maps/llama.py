"""Llama 2, 3, 3.1, 3.2, 3.3 (text)."""

from miles.models.maps.entry import Config, Entry
from miles.models.maps.family import Map
from miles.models.maps.parts import attention, gated_mlp


def layer(config: Config, i: int) -> list[Entry]:
    bias = bool(config.get("attention_bias"))
    return attention(config, bias=bias, out_bias=bias) + gated_mlp(config, config.number("intermediate_size"))


LLAMA = Map(("llama",), layer, frozenset({"attention_bias"}), fixed={"mlp_bias": (False,)})
