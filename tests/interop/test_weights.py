"""Tensor files: sharded, of a variant, of any dtype, straight to their place; one line where they are not whole."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.torch import load_file, save_file

from psa_jax.errors import PSAError
from psa_jax.interop import weights
from psa_jax.interop.diffusers import load_unet, load_vae
from psa_jax.interop.weights import find_weights, open_tensors, save_weights, torch_names
from psa_jax.models.unet import UNet
from psa_jax.tensor_file import all_finite

STEM = "diffusion_pytorch_model"
UNET_FILE = f"unet/{STEM}.safetensors"


def assert_equal(ours: nnx.Module, theirs: nnx.Module) -> None:
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(theirs))


@pytest.fixture(scope="module")
def unet(sdxl) -> UNet:
    """Read from one float32 file; has stacks of two blocks."""
    return load_unet(sdxl[0])


def test_models_of_one_configuration_share_nothing(unet):
    one, other = (weights.abstract_model(UNet, unet.config) for _ in range(2))
    assert one.conv_in is not other.conv_in and one.conv_in.kernel is not other.conv_in.kernel
    shape, one.conv_in.kernel = other.conv_in.kernel.shape, None
    assert weights.abstract_model(UNet, unet.config).conv_in.kernel.shape == shape


def test_stacked_blocks_hold_the_tensors_of_each_block(sdxl, unet):
    theirs = sdxl[1].unet.state_dict()
    stack = unet.down_blocks[1].attentions[0].transformer_blocks
    for block in range(2):
        name = f"down_blocks.1.attentions.0.transformer_blocks.{block}"
        np.testing.assert_array_equal(stack.ff.net_0.proj.kernel[block], theirs[f"{name}.ff.net.0.proj.weight"].T)
        np.testing.assert_array_equal(stack.attn2.to_out_0.bias[block], theirs[f"{name}.attn2.to_out.0.bias"])
    path = ("mid_block", "attentions", 0, "transformer_blocks", "norm1", "scale")
    assert torch_names(path, (2, 16)) == [f"mid_block.attentions.0.transformer_blocks.{i}.norm1.weight" for i in (0, 1)]


def test_shards_and_variants_as_diffusers_writes_them(sdxl, unet, tmp_path):
    theirs = sdxl[1].unet
    theirs.save_pretrained(tmp_path / "unet", max_shard_size="40KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    assert_equal(load_unet(tmp_path), unet)

    theirs.save_pretrained(tmp_path / "unet", max_shard_size="40KB", variant="fp16")
    assert (tmp_path / "unet" / f"{STEM}.safetensors.index.fp16.json").is_file()
    assert_equal(load_unet(tmp_path, variant="fp16"), unet)

    single = tmp_path / "single"
    theirs.save_pretrained(single / "unet", variant="fp16")
    assert find_weights(single / "unet", STEM, "fp16").name == f"{STEM}.fp16.safetensors"
    assert_equal(load_unet(single, variant="fp16"), unet)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtype_on_load_is_torchs_cast_and_saving_keeps_every_byte(stored, dtype, sd1, tmp_path):
    folder, pipeline = sd1
    tensors = {name: tensor.to(stored) for name, tensor in pipeline.vae.state_dict().items()}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text((folder / "vae" / "config.json").read_text())
    save_file(tensors, tmp_path / "vae" / f"{STEM}.safetensors", {"format": "pt"})

    vae = load_vae(tmp_path, dtype=jnp.dtype(str(dtype).removeprefix("torch.")))
    save_weights(vae, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == dtype
        assert torch.equal(again[name].view(torch.uint8), tensor.to(dtype).contiguous().view(torch.uint8)), name


def test_each_device_gets_and_reads_only_its_part(sdxl, unet, monkeypatch):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows = []

    def sharding(path, shape):
        last = shape[-1] % 2 == 0
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "model" if last else None))

    import psa_jax.interop.weights as weights

    def recording(tensors, path, shape, index, dtype):
        part = read(tensors, path, shape, index, dtype)
        rows.append((shape, part.shape))
        return part

    read = weights._read
    monkeypatch.setattr(weights, "_read", recording)
    folder = sdxl[0]
    config = unet.config
    sharded = weights.load_weights(
        weights.abstract_model(UNet, config), folder / UNET_FILE, sharding=sharding, dtype=jnp.float32
    )
    assert_equal(sharded, unet)
    halves = [(whole, part) for whole, part in rows if whole[-1] % 2 == 0]
    assert len(halves) > 100
    assert all(part == (*whole[:-1], whole[-1] // 2) for whole, part in halves)
    kernel = sharded.down_blocks[1].attentions[0].transformer_blocks.attn1.to_q.kernel[...]
    assert [s.data.shape for s in kernel.addressable_shards] == [(2, 16, 8)] * 2


def index_of(folder: Path) -> Path:
    return folder / "unet" / f"{STEM}.safetensors.index.json"


def edit_index(change):
    def damage(folder: Path) -> None:
        index = json.loads(index_of(folder).read_text())
        change(index["weight_map"])
        index_of(folder).write_text(json.dumps(index))

    return damage


def shard(folder: Path, number: int) -> Path:
    return sorted((folder / "unet").glob("*.safetensors"))[number]


def move_one(files):
    name, other = next(iter(files)), sorted(set(files.values()))[-1]
    assert files[name] != other
    files[name] = other


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shard(f, 1).unlink(), ["-00002-of-", "not found", "index.json lists it"]),
        (lambda f: shard(f, 1).write_bytes(shard(f, 1).read_bytes()[:-5]), ["-00002-of-", "not a whole safetensors"]),
        (lambda f: shutil.copy(shard(f, 0), shard(f, 1)), ["add_embedding.", "is in another file, too"]),
        (lambda f: index_of(f).write_text('{"weight_map": {"a": "b", "a": "c"}}'), ["'a' is given twice"]),
        (edit_index(lambda files: files.update({"no.such": max(files.values())})), ["missing tensors: no.such"]),
        (edit_index(lambda files: files.update({"conv_in.bias": "../x.safetensors"})), ["'../x.safetensors' is not"]),
        (edit_index(lambda files: files.update({"conv_in.bias": "x.bin"})), ["'x.bin' is not the name of"]),
        (edit_index(dict.clear), ["no weight_map"]),
        (lambda f: (f / UNET_FILE).write_bytes(shard(f, 0).read_bytes()), ["delete one of them"]),
    ],
    ids=["absent", "truncated", "in two", "listed twice", "listed", "outside", "pickle", "empty", "both"],
)
def test_shards_that_are_not_as_the_index_says(damage, words, sdxl, tmp_path):
    sdxl[1].unet.save_pretrained(tmp_path / "unet", max_shard_size="40KB")
    damage(tmp_path)
    with pytest.raises(PSAError) as caught:
        load_unet(tmp_path)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in [str(tmp_path), *words]), text


@pytest.mark.parametrize(
    "change",
    [
        lambda files: files.update({name: f"./{file}" for name, file in files.items()}),
        move_one,
        lambda files: files.pop("conv_in.bias"),
    ],
    ids=["dot slash", "moved", "unlisted"],
)
def test_an_index_that_says_otherwise_where_the_libraries_do_not_care(change, sdxl, unet, tmp_path):
    sdxl[1].unet.save_pretrained(tmp_path / "unet", max_shard_size="40KB")
    edit_index(change)(tmp_path)
    assert_equal(load_unet(tmp_path), unet)


def test_what_is_there_instead_is_said(tmp_path):
    wanted = f"{tmp_path / STEM}.safetensors: weights not found; "
    with pytest.raises(PSAError, match="download the folder again") as caught:
        find_weights(tmp_path, STEM)
    assert str(caught.value).startswith(wanted)
    (tmp_path / f"{STEM}.bin").touch()
    with pytest.raises(PSAError, match=f"{STEM}.bin is a pickle, which can run code, .* save_pretrained"):
        find_weights(tmp_path, STEM)
    (tmp_path / f"{STEM}.fp16.safetensors").touch()
    with pytest.raises(PSAError, match="those of the variant fp16 are there; give --variant=fp16"):
        find_weights(tmp_path, STEM)
    with pytest.raises(PSAError, match=f"{STEM}.ema.safetensors: weights not found, but .*fp16"):
        find_weights(tmp_path, STEM, "ema")


def test_numbers_that_are_no_floats_are_refused(sd1, tmp_path):
    folder, pipeline = sd1
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text((folder / "vae" / "config.json").read_text())
    tensors = pipeline.vae.state_dict()
    tensors["quant_conv.bias"] = tensors["quant_conv.bias"].to(torch.int8)
    save_file(tensors, tmp_path / "vae" / f"{STEM}.safetensors")
    with pytest.raises(PSAError, match="quant_conv.bias is of dtype I8 .*give the file"):
        load_vae(tmp_path)


def vae_folder(sd1, path: Path, change) -> Path:
    """The random pipeline's VAE after `change(tensors)`."""
    folder, pipeline = sd1
    (path / "vae").mkdir()
    shutil.copy(folder / "vae" / "config.json", path / "vae")
    tensors = pipeline.vae.state_dict()
    change(tensors)
    save_file(tensors, path / "vae" / f"{STEM}.safetensors")
    return path


NAME = "decoder.mid_block.attentions.0.to_q.weight"


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(stored, value, sd1, tmp_path):
    def change(tensors):
        tensors[NAME] = tensors[NAME].to(stored, copy=True)
        tensors[NAME][-1, -1] = value

    with pytest.raises(PSAError, match=f"{NAME} has values that are not finite in float32; .*download it again"):
        load_vae(vae_folder(sd1, tmp_path, change))


@pytest.mark.parametrize(("value", "dtype"), [(1e300, "float32"), (1e5, "float16"), (3.4e38, "float16")])
def test_numbers_beyond_the_type_asked_for_are_refused(value, dtype, sd1, tmp_path):
    def change(tensors):
        tensors[NAME] = tensors[NAME].double()
        tensors[NAME][0, 0] = value

    folder = vae_folder(sd1, tmp_path, change)
    with pytest.raises(PSAError, match=f"{NAME} has values that are not finite in {dtype}; take a type with a larger"):
        load_vae(folder, dtype=jnp.dtype(dtype))
    if dtype == "float16":  # the advice works
        assert np.isfinite(
            np.asarray(load_vae(folder, dtype=jnp.float32).decoder.mid_block.attentions[0].to_q.kernel)
        ).all()


def test_what_is_not_finite_is_not_written(sd1, tmp_path):
    vae = load_vae(sd1[0])
    bias = vae.decoder.conv_in.bias
    bias[...] = bias[...].at[0].set(1e5)
    save_weights(vae, tmp_path / "a.safetensors")
    with pytest.raises(PSAError, match="not written: decoder.conv_in.bias has .* not finite in float16; write a"):
        save_weights(vae, tmp_path / "b.safetensors", dtype=np.float16)
    bias[...] = bias[...].at[0].set(jnp.nan)
    with pytest.raises(PSAError, match="decoder.conv_in.bias has values that are not finite in float32"):
        save_weights(vae, tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_finite_by_the_bits_is_what_numpy_finds(dtype):
    finfo = jnp.finfo(dtype)
    edge = np.array([0.0, -0.0, finfo.max, finfo.min, finfo.tiny, finfo.smallest_subnormal], jnp.dtype(dtype))
    assert all_finite(edge) and all_finite(edge[:0]) and all_finite(edge.reshape(2, 3).T)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for size in (1, 7, 1 << 16, (1 << 16) + 1):
            values = np.zeros(size, jnp.dtype(dtype))
            values[-1] = bad
            assert not all_finite(values) and not all_finite(values[::-1])


@pytest.mark.slow
def test_what_looking_for_what_is_not_finite_costs():
    """Half a second for the 860 million weights of an SD1.5 UNet on one core; printed, and bounded loosely."""
    for dtype in (np.float32, np.float16, jnp.bfloat16):
        values = np.ones(1 << 26, dtype)
        start = time.perf_counter()
        assert all_finite(values)
        seconds = (time.perf_counter() - start) * 860e6 / values.size
        print(f"{np.dtype(dtype).name}: {seconds:.2f} s for 860 million numbers")
        assert seconds < 10


def test_a_tensor_is_read_in_parts(tmp_path):
    wanted = torch.arange(24.0).reshape(2, 3, 4).bfloat16()
    save_file({"odd": torch.zeros(3, dtype=torch.float16), "a": wanted}, tmp_path / "a.safetensors")
    part = open_tensors(tmp_path / "a.safetensors").by_name["a"].read((slice(1, 2), slice(None), slice(1, 4, 2)))
    np.testing.assert_array_equal(part.astype(np.float32), wanted[1:2, :, 1:4:2].float().numpy())


MEASURE = """
import re, resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
from flax import nnx
from psa_jax.interop.weights import abstract_model, load_weights, parameter_count, read_json
from psa_jax.models.config import VAEConfig
from psa_jax.models.vae import VAE
path, dtype = Path(sys.argv[1]), jnp.dtype(sys.argv[2])
model = abstract_model(VAE, VAEConfig.from_json(read_json(path / "config.json")))
jax.block_until_ready(jnp.zeros(1) + 1)
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
loaded = load_weights(model, path / "diffusion_pytorch_model.safetensors", dtype=dtype)
jax.block_until_ready(nnx.state(loaded))
# Not ru_maxrss, which begins with what the process that started this one held.
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print((peak - before) / (parameter_count(loaded) * dtype.itemsize))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_while_loading_is_at_most_a_fifth_above_the_weights(dtype, tmp_path):
    """About 1.4 GB of float32 in the file."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    widths = (512, 512, 1024, 1024, 1024)
    with torch.device("meta"):
        theirs = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 5,
            up_block_types=("UpDecoderBlock2D",) * 5,
            block_out_channels=widths,
            layers_per_block=2,
        )
    theirs = theirs.to_empty(device="cpu")
    for parameter in theirs.parameters():
        torch.nn.init.zeros_(parameter)  # what the memory held before may be no number
    theirs.save_pretrained(tmp_path, max_shard_size="100GB")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dtype], capture_output=True, text=True, check=True
    )
    ratio = float(done.stdout)
    print(f"peak memory while loading as {dtype}: {ratio:.3f} times the weights")
    assert 0.9 <= ratio <= 1.2
