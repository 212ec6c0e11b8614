"""Linear layers with their weights in oneDNN's layout: the same bits, compiled or not."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from model.layers import Mlp
from worker import packed
from worker.packed import PackedLinear, pack_linears

needs_onednn = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16 for oneDNN")


def linear(ins: int, outs: int, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(ins, outs, bias=bias).to(dtype).requires_grad_(False)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("ins", "outs"), [(32, 96), (256, 16), (40, 8)])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 16), (32, 16)])
def test_it_has_the_bits_of_the_linear_layer_it_was(shape: tuple[int, ...], ins: int, outs: int, bias: bool) -> None:
    layer = linear(ins, outs, bias)
    x = torch.randn(*shape, ins, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        assert torch.equal(PackedLinear(layer, tokens=64)(x), layer(x))


@needs_onednn
@pytest.mark.parametrize("rows", [1, 2, 7, 32])
def test_an_mlp_takes_its_gelu_before_rounding_and_a_row_has_the_same_bits_whatever_is_beside_it(rows: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mlp = Mlp(64, 4).bfloat16().requires_grad_(False)
    x = torch.randn(32, 16, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    module = nn.ModuleDict({"mlp": mlp})
    with torch.inference_mode():
        plain, exact = mlp(x), copy.deepcopy(mlp).float()(x.float())
        pack_linears(module, tokens=512)
        given = module["mlp"](x)
        assert [type(part) for part in module["mlp"]] == [PackedLinear, PackedLinear]
        assert (given.float() - exact).norm() < (plain.float() - exact).norm()
        assert torch.equal(module["mlp"](x[:rows]), given[:rows])


@needs_onednn
def test_its_compiled_graph_serves_other_weights_too() -> None:
    """A new version of a model starts without compiling."""
    layers = nn.Sequential(linear(32, 64), nn.SiLU(), linear(64, 32))
    others = nn.Sequential(linear(32, 64), nn.SiLU(), linear(64, 32))
    for parameter in others.parameters():
        parameter.mul_(-1.5)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x)

    compiled = torch.compile(run, dynamic=False, backend=backend)
    with torch.inference_mode():
        for module in (layers, others):
            expected = module(x)
            pack_linears(module, tokens=4)
            assert torch.equal(compiled(module, x), expected)
    assert len(graphs) == 1


@needs_onednn
def test_the_compiler_takes_it() -> None:
    module = nn.Sequential(linear(32, 64))
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        expected = module(x).float().exp()
        pack_linears(module, tokens=4)
        given = torch.compile(lambda x: module(x).float().exp(), backend="aot_eager")(x)
    assert torch.equal(given, expected)


@needs_onednn
def test_every_layer_in_bfloat16_is_packed_and_its_own_weight_let_go() -> None:
    module = nn.Sequential(linear(8, 8), nn.ModuleDict({"inner": nn.Sequential(linear(8, 8), linear(8, 8, dtype=torch.float32))}))
    pack_linears(module, tokens=4)
    pack_linears(module, tokens=4)  # again: as it is
    kinds = [type(part) for part in module.modules() if not list(part.children())]
    assert kinds == [PackedLinear, PackedLinear, nn.Linear]
    assert [parameter.dtype for parameter in module.parameters()] == [torch.float32] * 2


def test_what_onednn_does_not_serve_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: False))
    module = nn.Sequential(linear(8, 8))
    pack_linears(module, tokens=4)
    assert type(module[0]) is nn.Linear
