"""Texts of compiled programs, as XLA writes them, for tests of what reads them."""

# A loop of four trips with a move that is hidden behind a product, and a gather that is not.
LOOP = """\
HloModule jit_f, is_scheduled=true, num_partitions=4

FileNames
1 "/home/user/model.py"
2 "/usr/lib/python3/site-packages/jax/core.py"

FunctionNames
1 "<module>"
2 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=40 end_line=40 column=0 end_column=0}
2 {file_name_id=1 function_name_id=2 line=12 end_line=12 column=4 end_column=9}
3 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}


%fused (p0: f32[8,128], p1: f32[128,128]) -> f32[8,128] {
  %p0 = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  %p1 = f32[128,128]{1,0} parameter(1)
  ROOT %dot = f32[8,128]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/while/body/dot_general" stack_frame_id=3}
}

%body (p: (s32[], f32[8,128], f32[128,128])) -> (s32[], f32[8,128], f32[128,128]) {
  %p = (s32[], f32[8,128]{1,0}, f32[128,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8,128]{1,0} get-tuple-element(%p), index=1
  %w = f32[128,128]{1,0} get-tuple-element(%p), index=2
  %start = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %fusion = f32[8,128]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/while/body/dot_general" stack_frame_id=3}, backend_config={"window_config":{"estimated_cycles":"1500000"}}
  %done = f32[8,128]{1,0} collective-permute-done(%start)
  ROOT %t = (s32[], f32[8,128]{1,0}, f32[128,128]{1,0}) tuple(%next, %done, %w)
}

%condition (p.1: (s32[], f32[8,128], f32[128,128])) -> pred[] {
  %p.1 = (s32[], f32[8,128]{1,0}, f32[128,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %bound = s32[] constant(4)
  ROOT %lt = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (a: f32[8,128], b: f32[64,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0), metadata={op_name="a"}
  %b = f32[64,128]{1,0} parameter(1), metadata={op_name="b"}
  %gather = f32[128,128]{1,0} all-gather(%b), channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}, use_global_device_ids=true
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8,128]{1,0}, f32[128,128]{1,0}) tuple(%zero, %a, %gather)
  %loop = (s32[], f32[8,128]{1,0}, f32[128,128]{1,0}) while(%begin), condition=%condition, body=%body, metadata={op_name="jit(f)/while" stack_frame_id=2}
  ROOT %out = f32[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501
