"""FSDP2 around the fused modules: world size 1, in a process of its own."""

import subprocess
import sys

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3MoeConfig
from miles.models.forward import PackedContext, forward
from miles.models.load import build_model

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))  # a GPU may be there too
config = Qwen3MoeConfig(hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=16, vocab_size=131, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
                        tie_word_embeddings=sys.argv[2] == "tied")
ids, position = torch.randint(0, 131, (37,), generator=torch.Generator().manual_seed(1)), torch.cat([torch.arange(20), torch.arange(17)])

def run(shard):
    torch.manual_seed(0)
    model = build_model(config, batch_invariant=True).train()
    if shard:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    logits = forward(model, ids, position, PackedContext(cu_seqlens=torch.tensor([0, 20, 37], dtype=torch.int32)))
    logits.square().sum().backward()
    whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
    return logits.detach(), {n: whole(p.grad) for n, p in model.named_parameters()}, list(model.state_dict())

(a, ga, ka), (b, gb, kb) = run(False), run(True)
assert torch.equal(a, b)
assert ka == kb
assert ga.keys() == gb.keys()
for name in ga:
    assert torch.equal(ga[name], gb[name]), name
dist.destroy_process_group()
print("same bits")
"""


def test_fsdp2_and_checkpointing_change_no_bit(tmp_path):
    for tied in ("tied", "untied"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / tied), tied], capture_output=True, text=True, timeout=240, check=False)
        assert done.stdout.strip().endswith("same bits"), done.stdout + done.stderr
