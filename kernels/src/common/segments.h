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

// Where nobody reads the 16-bit states of a scan: in place of each segment's own state in `locals`, what enters the segment; `initial`, or zero, enters
// the first. Of params, reverse, gates, initial and final_state (or null) count.
constexpr int kMostEntered = 128;  // segments
int choose_entered_segments(const pt_problem& problem);  // the fewest with which query_scan and key_grads keep the device busy
// Whether they scan the segments' own states first, from decayed values: where there are several, and where somebody wants the state at the end.
bool scans_segments(const pt_problem& problem, bool wants_final);
int enter_segments(const pt_problem& problem, const pt_chunk_state_params& params, int segments, float* locals, cudaStream_t stream);

int64_t boundary_elements(const pt_problem& problem);  // of all (b, h)

}  // namespace powertrain
