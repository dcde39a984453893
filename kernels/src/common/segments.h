// chunk_state in time segments: where too few tiles exist to fill the device, time is split, each segment starts from zero, and
// join_segments adds what the earlier segments carry into the later ones.
#pragma once
#include "stages.h"

namespace powertrain {

// Segments for `blocks_per_segment` thread blocks each, one block resident per multiprocessor: the fewest that keep the device busy.
int choose_segments(const pt_problem& problem, int64_t blocks_per_segment);

// First logical chunk of segment s; logical chunks run in the direction of the scan.
PT_HD int64_t segment_begin(int64_t chunk_count, int segments, int s) { return chunk_count * s / segments; }

// locals: (segments, B, Hk, boundary state) fp32, each segment's state at its end with zero (segment 0: `initial`) at its start.
// Adds decay * incoming to the 16-bit states of segments >= 1 and writes the final state.
int join_segments(const pt_problem& problem, const pt_chunk_state_params& params, int segments, const float* locals, cudaStream_t stream);

// Adds what `initial` brings to 16-bit states that pt_chunk_state scanned from zero. Of params, reverse, gates, initial and states count.
int carry_in(const pt_problem& problem, const pt_chunk_state_params& params, cudaStream_t stream);

// A scan whose 16-bit states nobody reads, for query_scan and key_grads, of packed k and v', in reverse of q and dn'.
struct SegmentScan {
  bool reverse;
  const void *x, *u, *gates;
  const float* initial;  // boundary or null: zero
  float* final_state;    // boundary or null
  // Whose tensors are packed on the way to x and u, or both null.
  const pt_query_scan_params* inputs;
  const pt_key_grads_params* gradients;
};
constexpr int kMostEntered = 128;  // segments
int choose_entered_segments(const pt_problem& problem);  // the fewest with which query_scan and key_grads keep the device busy
// In place of each segment's own state in `locals` (of the last one's only if there is a final_state) what enters the segment; and the final state.
int enter_segments(const pt_problem& problem, const SegmentScan& scan, int segments, float* locals, cudaStream_t stream);

int64_t boundary_elements(const pt_problem& problem);  // of all (b, h)

}  // namespace powertrain
