// What small groups of points share: mean, principal directions, coefficients (RMM, arXiv 2510.14163).
#pragma once

#include <cstdint>

namespace rmm {

// One factor of n tasks, component by component: values[(t · rank + k) · length + l].
struct Stack {
    const double* values;
    uint64_t n, rank, length;
};

// Where results go. Directions beyond those that the points have are zero, and so are their coefficients.
struct SharedPart {
    float* mean;          // (rank, length); zeros where the points are not centred
    float* basis;         // (p, rank, length)
    float* coefficients;  // (n, p, n_groups)
};

// Values that the points of a group can have in all, and directions.
constexpr uint64_t MOST_POINT_VALUES = 1 << 14;
constexpr uint64_t MOST_SMALLER_SIDE = 64;

// Cuts the positions into groups of `group`, the last one shorter if need be, and finds for each the p
// principal directions of its n points of rank · group values: by the eigenvectors of the Gram matrix
// of the points or of the values, whichever is smaller (cyclic Jacobi), made orthonormal in the space of
// values. Mean and directions are rounded to f32, and coefficients are the least-squares fit against
// what was rounded. A direction is stored with its largest entry positive; one with less than 1e-12 of
// the group's norm along it is noise, stored as zero.
//
// n · rank · group is at most MOST_POINT_VALUES, the smaller of n and rank · group at most
// MOST_SMALLER_SIDE, p at most that smaller side. False if a value is not finite or beyond f32. In f64, no sum
// depends on the machine or on the threads.
bool find_principal(const Stack& stack, uint64_t group, uint64_t p, bool centred, uint32_t n_threads,
                    const SharedPart& shared);

}  // namespace rmm
