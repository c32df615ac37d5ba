"""Kernels and their bytes in texts of compiled programs, against arithmetic."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.planning import hlo, kernels
from diffusion_jax.planning.hlo import Collective
from diffusion_jax.planning.kernels import Group

# What XLA makes for eight H100s of a collective of each kind on f32[8,16], a
# scan of four steps, a loop of unknown length and a condition.
GOLDEN = Path(__file__).parent / 'golden'
TEXT = (GOLDEN / 'gpu_program.txt').read_text()
A = 8 * 16 * 4  # bytes of the array


def test_kernels_of_a_gpu_program():
  found = {one.name: one for one in kernels.kernels(TEXT)}
  once = {name: one.bytes for name, one in found.items() if one.count == 1}
  often = {name: one.bytes for name, one in found.items() if one.count == 4}
  assert once | often == {name: one.bytes for name, one in found.items()}
  assert often == {
    'loop_compare_fusion': 4 + 1,
    'copy.13': A + A,
    'all-reduce-start': A + A,
    'copy.19': 4 + 4,
    'input_add_reduce_fusion': A + A + A + 4,
    'loop_add_fusion': 4 + 4,
    # Of f32[4] one element is replaced, of two other arrays one is read; and
    # the index and what is added.
    'loop_dynamic_update_slice_fusion': 4 + 4 + 4 + 4 + 4,
  }
  assert once == {
    'wrapped_iota': 16,
    'loop_broadcast_fusion': 16,
    'copy.31': 4 + 4,
    'copy.17': A + A,
    'collective-permute-start': A + A,
    'wrapped_sine': A + A,
    'all-reduce-start.1': A + A,
    'reduce-scatter-start': 4096 + 512,
    'wrapped_transpose': A + A,
    'all-to-all-start': A + A,
    'loop_multiply_fusion.1': 512 + 512,
    'all-gather-start': 512 + 4096,
    'loop_compare_fusion.2': 4 + 1,  # the first of four elements
    'copy.27': A + A,
    # The loop of unknown length, once.
    'input_reduce_fusion': A + 4,
    'loop_compare_fusion.1': 4 + 1,
    'loop_multiply_fusion': A + A,
    # Of two equal branches one, whose operands are the same array.
    'gemm_fusion_dot_general.4': A + 8 * 8 * 4,
    'loop_transpose_fusion': A + A,
  }


def test_kernels_are_grouped_by_kind():
  found = kernels.kernels(TEXT)
  groups = {group.name: group for group in kernels.by_kind(found)}
  assert groups['all-reduce'] == Group('all-reduce', 5, 5 * 2 * A)
  assert groups['fusion with a product'].count == 1
  assert groups['fusion with a reduction'].count == 5
  assert groups['copy or conversion'].count == 2 + 2 * 4 + 3 + 2
  assert sum(group.bytes for group in groups.values()) == sum(
    one.moved for one in found
  )


def test_collectives_of_a_gpu_program():
  """In shard_map they share a channel; each counts."""
  assert set(hlo.collectives(TEXT, 8)) == {
    Collective('all-reduce', 8, 5, 5 * A),
    Collective('all-gather', 8, 1, 4096),
    Collective('reduce-scatter', 8, 1, 4096),
    Collective('all-to-all', 8, 1, A),
    Collective('collective-permute', 2, 1, A),
  }


# As XLA prints a convolution with bias, its gradients, a cuBLAS product, a
# TPU's fusion with an operand on the chip, and a result of more than five.
LINES = """
%fused (p.0: bf16[4,8], p.1: f32[8]) -> (bf16[4,8], f32[8], f32[8], f32[8], f32[8], /*index=5*/f32[8]) {
  %p.0 = bf16[4,8]{1,0} parameter(0)
  %p.1 = f32[8]{0} parameter(1)
  %r = f32[8]{0} reduce(%p.0, %p.1), dimensions={0}, to_apply=%add
  ROOT %t = (bf16[4,8]{1,0}, f32[8]{0}, f32[8]{0}, f32[8]{0}, f32[8]{0}, /*index=5*/f32[8]{0}) tuple(%p.0, %r, %r, %r, %r, /*index=5*/%r)
}

%on_chip (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0:T(1024)S(1)} parameter(0)
  ROOT %n = f32[1024]{0:T(1024)} negate(%p)
}

ENTRY %main (x: bf16[2,8,8,16], w: bf16[32,3,3,16]) -> bf16[2,8,8,32] {
  %x = bf16[2,8,8,16]{3,2,1,0} parameter(0)
  %w = bf16[32,3,3,16]{3,2,1,0} parameter(1)
  %b = f32[32]{0} parameter(2)
  %conv.1 = (bf16[2,8,8,32]{3,2,1,0}, u8[100]{0}) custom-call(%x, %w, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBiasActivationForward", metadata={op_name="jit(f)/conv" stack_frame_id=7}
  %y = bf16[2,8,8,32]{3,2,1,0} get-tuple-element(%conv.1), index=0
  %conv.2 = (bf16[2,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%y, %w), custom_call_target="__cudnn$convBackwardInput"
  %conv.3 = (bf16[32,3,3,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %y), custom_call_target="__cudnn$convBackwardFilter"
  %gemm = (f32[4,4]{1,0}, s8[0]{0}) custom-call(%u, %u), custom_call_target="__cublas$lt$matmul"
  %u = f32[4,4]{1,0} parameter(3)
  %many = (bf16[4,8]{1,0}, f32[8]{0}, f32[8]{0}, f32[8]{0}, f32[8]{0}, /*index=5*/f32[8]{0}) fusion(%h, %k), kind=kInput, calls=%fused
  %h = bf16[4,8]{1,0} parameter(4)
  %k = f32[8]{0} parameter(5)
  %v = f32[1024]{0:T(1024)S(1)} parameter(6)
  %tpu = f32[1024]{0:T(1024)} fusion(%v), kind=kLoop, calls=%on_chip
  %unknown = s4[10]{0} custom-call(%h), custom_call_target="some_kernel", called_computations={%on_chip}
  ROOT %out = bf16[2,8,8,32]{3,2,1,0} bitcast(%y)
}
"""  # noqa: E501


def test_custom_calls_and_large_tuples():
  found = {one.name: one for one in kernels.kernels(LINES)}
  x, w, y = 2 * 64 * 16 * 2, 32 * 9 * 16 * 2, 2 * 64 * 32 * 2
  assert {name: one.bytes for name, one in found.items()} == {
    'conv.1': x + w + 32 * 4 + y + 100,
    'conv.2': y + w + x,
    'conv.3': x + y + w,
    'gemm': 64 + 64,
    'many': 64 + 32 + 64 + 5 * 32,
    'tpu': 1024 * 4,
    'unknown': 64 + 10,
  }
  assert {name: one.kind for name, one in found.items()} == {
    'conv.1': 'convolution',
    'conv.2': 'convolution, gradient of the input',
    'conv.3': 'convolution, gradient of the kernel',
    'gemm': 'matrix product',
    'many': 'fusion with a reduction',
    'tpu': 'elementwise fusion',
    'unknown': 'some_kernel',
  }
  assert found['conv.1'].source == 'jit(f)/conv'
  assert found['conv.1'].shape == '(bf16[2,8,8,32], u8[100])'


def test_what_moves_most_is_first():
  first, *rest = kernels.largest(kernels.kernels(LINES), most=3)
  assert first.bytes >= rest[0].bytes >= rest[1].bytes
  assert first.name.startswith('convolution')


@pytest.mark.parametrize('steps', [1, 7])
def test_a_program_compiled_here(steps):
  """A loop that doubles a row of a matrix: a row read, a row written."""

  def body(i, x):
    return x.at[i].multiply(2.0)

  fn = jax.jit(lambda x: jax.lax.fori_loop(0, steps, body, x), donate_argnums=0)
  text = fn.lower(jnp.zeros((steps, 1000))).compile().as_text()
  found = kernels.kernels(text)
  rows = [one for one in found if one.bytes >= 8000]
  assert sum(one.count for one in rows) == steps
  assert all(one.bytes < 8100 for one in rows)


def test_attributes_of_a_kernel_may_take_several_lines():
  """As XLA writes those of Pallas kernels: the computation goes on after them.

  A product after the kernel, and a sum over two devices, are seen.
  """
  text = """HloModule jit_f

ENTRY %main (p.1: f32[8,16]) -> f32[8,16] {
  %p.1 = f32[8,16]{1,0} parameter(0)
  %attend.1 = f32[8,16]{1,0} custom-call(%p.1), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
 "note":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/attend"}
  %add.1 = f32[8,16]{1,0} add(%attend.1, %p.1)
  ROOT %all-reduce.1 = f32[8,16]{1,0} all-reduce(%add.1), \
replica_groups={{0,1}}, to_apply=%sum
}
"""
  found = kernels.kernels(text)
  assert [(one.name, one.kind, one.bytes) for one in found] == [
    ('attend.1', 'tpu_custom_call', 2 * A),
    ('add.1', 'add', 3 * A),
    ('all-reduce.1', 'all-reduce', 2 * A),
  ]
  assert found[0].source == 'jit(f)/attend'
  assert hlo.collectives(text, 2) == [Collective('all-reduce', 2, 1, A)]
