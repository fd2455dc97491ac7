// Loading: a task's factors into an arena of the caller's.
#pragma once

#include <functional>

#include "arrays.hpp"

namespace rmm {

// Where an entry's factors go in an arena.
struct Placement {
    uint64_t offset[2];   // of A and B, multiples of 64
    uint64_t n_bytes[2];
};

// Bytes of a value of an output dtype (RMM_F32, RMM_F16, RMM_BF16).
inline uint64_t output_bytes(int dtype) { return dtype == RMM_F32 ? 4 : 2; }

// Calls visit(j, entry, form, target id, target, placement, offset in the file) for each entry of a
// task; returns the bytes of the arena. Throws Failure if they exceed 64 bits.
using VisitEntry = std::function<void(uint64_t j, const Entry&, const Form&, uint32_t, const Target&, const Placement&, uint64_t)>;
uint64_t visit_entries(const Index& index, const Task& task, int dtype, const VisitEntry& visit);

void load_task(const Index& index, const Task& task, int dtype, uint8_t* arena, uint64_t arena_bytes,
               uint32_t n_threads);

void load_factor(const Index& index, const Task& task, uint64_t entry, int factor, int dtype, uint8_t* out,
                 uint64_t out_bytes);

// RMM-080, RMM-081, RMM-082 over all that a task uses; the first breach refuses.
void check_task(const Index& index, const Task& task);

}  // namespace rmm
