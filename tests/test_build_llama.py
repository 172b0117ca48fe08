"""LLaMA-shaped decoders as neural graphs."""

from __future__ import annotations

import pytest
import torch
from networks import relative

import ngkernels as ngk
from neural_graphs import build
from neural_graphs.models import NGGNN

D, FFN, VOCAB = 8, 12, 10


def llama(layers=2, width=D, ffn=FFN, keys=None, vocab=VOCAB, head=True, prefix="model.", make=torch.randn) -> dict[str, torch.Tensor]:
    """Tensors under the names of Hugging Face's LlamaForCausalLM."""
    keys = width if keys is None else keys
    state = {f"{prefix}embed_tokens.weight": make(vocab, width)} if vocab else {}
    for k in range(layers):
        shapes = {
            "input_layernorm": (width,), "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width), "post_attention_layernorm": (width,), "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width),
            "mlp.down_proj": (width, ffn),
        }  # fmt: skip
        state |= {f"{prefix}layers.{k}.{name}.weight": make(*shape) for name, shape in shapes.items()}
    if vocab:
        state[f"{prefix}norm.weight"] = make(width)
    if vocab and head:
        state["lm_head.weight"] = make(vocab, width)
    return state


def block(network: build.Network, name: str) -> tuple[ngk.Block, object]:
    k = network.origin.blocks.index(name)
    return network.graph.parts[0].blocks[k], network.weights[k]


# ---- the graph ----
def test_node_layers_and_blocks():
    network = build.from_state_dict(llama())
    names, layout = network.origin.layers, network.layout
    assert names[:9] == (
        "tokens", "embedding", "layers.0.normed", "layers.0.heads", "layers.0.attended", "layers.0.normed'", "layers.0.gate", "layers.0.up", "layers.0.out",
    )  # fmt: skip
    assert layout[:10] == (VOCAB, D, D, D, D, D, FFN, FFN, D, D) and layout[-2:] == (D, VOCAB)
    assert network.activations[names.index("layers.1.gate") - 1] == "silu" and set(network.activations) == {"silu", "none"}
    joined = {
        name: (names[b.src], names[b.dst], b.kind) for name, b in zip(network.origin.blocks, network.graph.parts[0].blocks, strict=True)
    }
    first = "model.layers.0."
    assert joined["model.embed_tokens.weight"] == ("tokens", "embedding", "dense")
    assert joined[first + "input_layernorm.weight"] == ("embedding", "layers.0.normed", "diagonal")
    assert joined[first + "self_attn.qkv"] == ("layers.0.normed", "layers.0.heads", "dense")
    assert joined[first + "self_attn.o_proj.weight"] == ("layers.0.heads", "layers.0.attended", "dense")
    assert joined["layers.0.residual of attention"] == ("embedding", "layers.0.attended", "diagonal")
    assert joined[first + "mlp.gate_proj.weight"] == ("layers.0.normed'", "layers.0.gate", "dense")
    assert joined["layers.0.gate times up"] == ("layers.0.gate", "layers.0.up", "diagonal")
    assert joined[first + "mlp.down_proj.weight"] == ("layers.0.up", "layers.0.out", "dense")
    assert joined["layers.0.residual of MLP"] == ("layers.0.attended", "layers.0.out", "diagonal")
    assert joined["model.norm.weight"] == ("layers.1.out", "norm", "diagonal")
    assert joined["lm_head.weight"] == ("norm", "logits", "dense")
    assert any("softmax" in text for text in network.origin.not_modelled)


def test_weights_are_views_of_the_tensors():
    state = llama()
    network = build.from_state_dict(state)
    storages = {t.untyped_storage().data_ptr() for t in state.values()}
    made = 0
    for w in network.weights:
        for t in w.planes if isinstance(w, build.Channels) else [w]:
            shared = t.untyped_storage().data_ptr() in storages
            made += 0 if shared else t.untyped_storage().nbytes()
            assert shared or torch.equal(t, torch.ones_like(t))
    assert made == 3 * 2 * 4  # one number for each residual connection and product
    _, down = block(network, "model.layers.1.mlp.down_proj.weight")
    assert torch.equal(down[0, :, :, 0], state["model.layers.1.mlp.down_proj.weight"].T)
    _, gamma = block(network, "model.layers.1.input_layernorm.weight")
    assert torch.equal(gamma[0, :, 0], state["model.layers.1.input_layernorm.weight"])
    assert all(not b.any() for b in network.biases) and [b.shape[1] for b in network.biases] == list(network.layout[1:])


def test_queries_keys_and_values_are_three_numbers_of_one_edge():
    state = llama()
    network = build.from_state_dict(state)
    _, qkv = block(network, "model.layers.0.self_attn.qkv")
    assert qkv.shape == (1, D, D, 3) == tuple(qkv.stacked().shape)
    for c, name in enumerate("qkv"):
        assert torch.equal(qkv.stacked()[0, :, :, c], state[f"model.layers.0.self_attn.{name}_proj.weight"].T)


def test_grouped_queries_share_keys():
    """Query head h reads the keys of group h // (query heads / groups)."""
    heads, groups, size = 4, 2, D // 4
    state = llama(1, keys=groups * size)
    with pytest.raises(build.CheckpointError, match=r"expected num_heads where queries share keys and values, got none"):
        build.from_state_dict(state)
    for wrong in (0, 3, 1):
        with pytest.raises(build.CheckpointError, match=rf"expected num_heads that fits 8 rows of queries and 4 of keys, got {wrong}"):
            build.from_state_dict(state, num_heads=wrong)
    _, qkv = block(build.from_state_dict(state, num_heads=heads), "model.layers.0.self_attn.qkv")
    found = qkv.stacked()[0].view(D, heads, size, 3)
    q, k, v = (state[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv")
    for h in range(heads):
        rows = slice(h // 2 * size, h // 2 * size + size)
        assert torch.equal(found[:, h, :, 0], q[h * size : (h + 1) * size].T)
        assert torch.equal(found[:, h, :, 1], k[rows].T) and torch.equal(found[:, h, :, 2], v[rows].T)
    assert all(p.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for p, t in zip(qkv.planes, (q, k, v), strict=True))


def test_parallel_attention_has_an_edge_each():
    state = llama()
    network = build.from_state_dict(state, attention="parallel")
    assert network.channels == 1 and all(isinstance(w, torch.Tensor) for w in network.weights)
    assert all(a is b for a, b in zip(network.tensors(), network.weights, strict=True))
    pairs = [block(network, f"model.layers.0.self_attn.{n}_proj.weight") for n in "qkv"]
    assert len({(b.src, b.dst) for b, _ in pairs}) == 1
    assert torch.equal(pairs[2][1][0, :, :, 0], state["model.layers.0.self_attn.v_proj.weight"].T)
    with pytest.raises(NotImplementedError, match=r"expected as many keys as queries with attention='parallel', got 4 and 8"):
        build.from_state_dict(llama(keys=4), num_heads=4, attention="parallel")
    with pytest.raises(ValueError, match=r"expected attention in vector, parallel, got 'x'"):
        build.from_state_dict(state, attention="x")


def test_counts_of_a_7b_model():
    """No values are needed; the counts are those of FIELD: 5.66e9 edges with queries, keys and values on one."""
    shapes = llama(32, 4096, 11008, vocab=32000, make=lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta"))
    network = build.from_state_dict(shapes)
    dense = 32 * (2 * 4096**2 + 3 * 4096 * 11008) + 2 * 32000 * 4096
    assert network.graph.num_edges == dense + 32 * (4 * 4096 + 11008) + 4096
    assert abs(dense / 5.66e9 - 1) < 2e-3
    assert network.graph.num_nodes == 2 * 32000 + 4096 + 32 * (5 * 4096 + 2 * 11008) + 4096


@pytest.mark.parametrize("variant", ["tied", "blocks only", "no prefix", "biases", "rotary buffers"])
def test_variants(variant: str):
    state = llama(
        1, head=variant != "tied", vocab=0 if variant == "blocks only" else VOCAB, prefix="" if variant == "no prefix" else "model."
    )
    if variant == "biases":
        state["model.layers.0.mlp.up_proj.bias"] = torch.randn(FFN)
    if variant == "rotary buffers":
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(2)
    network = build.from_state_dict(state)
    names = network.origin.layers
    assert (names[0], names[-1]) == (("input", "layers.0.out") if variant == "blocks only" else ("tokens", "logits"))
    if variant == "tied":
        assert torch.equal(network.weights[-1][0, :, :, 0], state["model.embed_tokens.weight"].T)
        assert network.origin.tensors[-1] == ("model.embed_tokens.weight",)
    if variant == "biases":
        assert torch.equal(network.biases[names.index("layers.0.up") - 1][0, :, 0], state["model.layers.0.mlp.up_proj.bias"])
        assert network.origin.biases[names.index("layers.0.up")] == "model.layers.0.mlp.up_proj.bias"
    assert network.origin.ignored == (("model.layers.0.self_attn.rotary_emb.inv_freq",) if variant == "rotary buffers" else ())


@pytest.mark.parametrize("attention", ["vector", "parallel"])
def test_a_decoder_goes_through_a_model_and_gradients_reach_it(backend: str, attention: str):
    """As blocks alone: the graph of a decoder, its numbers and gradients, against the same model on copies."""
    state = {name: t.requires_grad_() for name, t in llama(1).items()}
    network = build.from_state_dict(state, attention=attention)
    model = NGGNN(network.layout, d_hid=8, num_layers=3, out_features=2, edge_channels=network.channels, fourier_features=8, pooling="mean")
    tensors = network.tensors()
    assert len({t.shape[-1] for t in tensors}) == 1
    with ngk.use_backend(backend):
        out = model.forward_graph(network.graph, tensors, network.biases)
        out.sum().backward()
        again = model.forward_graph(network.graph, [t.detach().clone() for t in tensors], [b.clone() for b in network.biases])
    assert out.isfinite().all() and relative(again, out) <= 1e-6
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in state.values())


# ---- what is not built, what does not fit ----
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(D)}, NotImplementedError, r"got also model.layers.0.self_attn.q_proj.bias; biases of queries"),
        ({"model.layers.0.mlp.experts.0.w1.weight": torch.zeros(1)}, NotImplementedError, r"got also .*experts.* are not built"),
        ({"model.layers.0.mlp.up_proj.weight": torch.zeros(FFN, D).to(torch.float8_e4m3fn)}, NotImplementedError, r"got torch.float8_e4m3fn; quantised"),
        ({"model.layers.0.mlp.up_proj.weight": torch.zeros(FFN, D, dtype=torch.int8)}, NotImplementedError, r"got torch.int8; quantised"),
        ({"model.layers.0.mlp.up_proj.weight": torch.zeros(FFN + 1, D)}, build.CheckpointError, r"up_proj.weight' of shape \(12, 8\), got \(13, 8\)"),
        ({"model.layers.0.input_layernorm.weight": torch.zeros(D + 1)}, build.CheckpointError, r"input_layernorm.weight' of shape \(8,\), got \(9,\)"),
        ({"model.layers.0.mlp.down_proj.weight": None}, build.CheckpointError, r"expected a tensor 'model.layers.0.mlp.down_proj.weight', got none"),
        ({"model.layers.3.mlp.down_proj.weight": torch.zeros(D, FFN)}, build.CheckpointError, r"decoder blocks 0 to 3, got none with number 2"),
    ],
)  # fmt: skip
def test_other_decoders_are_refused(change: dict, error: type, message: str):
    state = {name: t for name, t in {**llama(), **change}.items() if t is not None}
    with pytest.raises(error, match=f"from_state_dict: .*{message}"):
        build.from_state_dict(state)
