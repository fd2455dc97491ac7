#include "principal.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "bytes.hpp"
#include "threads.hpp"

namespace rmm {
namespace {

// Groups that are worked on at once, one in each lane: all of what follows is done to W groups at a
// time, and no lane sees another.
constexpr unsigned W = 8;
constexpr uint64_t GROUPS_OF_UNIT = 512;
constexpr unsigned MOST_SWEEPS = 30;  // of Jacobi rotations; five to eight do
constexpr double NOISE = 1e-12;

#define RMM_LANES for (unsigned l = 0; l < W; ++l)

// GCC needs to be told; clang vectorises loops over lanes by itself, and refuses functions of such types.
#if defined(__GNUC__) && !defined(__clang__) && !defined(RMM_PORTABLE)
#pragma GCC diagnostic ignored "-Wpsabi"  // nothing here is called from elsewhere: all is inlined
typedef double Vec __attribute__((vector_size(64), aligned(64)));
typedef int64_t Mask __attribute__((vector_size(64), aligned(64)));
typedef float Narrow __attribute__((vector_size(32), aligned(32)));

RMM_INLINE Vec all(double value) { return Vec{} + value; }
RMM_INLINE Vec where(const Mask& condition, const Vec& a, const Vec& b) { return condition ? a : b; }
// As a whole: GCC 12 drops the rounding where it is written lane by lane.
RMM_INLINE Vec rounded_to_f32(const Vec& a) {
    return __builtin_convertvector(__builtin_convertvector(a, Narrow), Vec);
}
#else
template <class T>
struct alignas(64) Eight {
    T at[W];
    T& operator[](unsigned l) { return at[l]; }
    const T& operator[](unsigned l) const { return at[l]; }
};
typedef Eight<double> Vec;
typedef Eight<int64_t> Mask;

#define RMM_BINARY(RESULT, SIGN)                             \
    inline RESULT operator SIGN(const Vec& a, const Vec& b) { \
        RESULT out;                                          \
        RMM_LANES out[l] = a[l] SIGN b[l];                   \
        return out;                                          \
    }
RMM_BINARY(Vec, +)
RMM_BINARY(Vec, -)
RMM_BINARY(Vec, *)
RMM_BINARY(Vec, /)
RMM_BINARY(Mask, >)

inline Vec all(double value) {
    Vec out;
    RMM_LANES out[l] = value;
    return out;
}
inline Vec where(const Mask& condition, const Vec& a, const Vec& b) {
    Vec out;
    RMM_LANES out[l] = condition[l] ? a[l] : b[l];
    return out;
}
inline Vec rounded_to_f32(const Vec& a) {
    Vec out;
    RMM_LANES out[l] = static_cast<float>(a[l]);
    return out;
}
#endif

RMM_INLINE Vec root(const Vec& a) {
    Vec out;
    RMM_LANES out[l] = std::sqrt(a[l]);
    return out;
}
RMM_INLINE Vec magnitude(const Vec& a) { return where(all(0) > a, all(0) - a, a); }
RMM_INLINE bool any(const Mask& condition) {
    alignas(64) int64_t of[W];
    std::memcpy(of, &condition, sizeof of);
    int64_t found = 0;
    RMM_LANES found |= of[l];
    return found != 0;
}

RMM_INLINE Vec dot(const Vec* a, const Vec* b, uint64_t n) {
    Vec sum = all(0);
    for (uint64_t i = 0; i < n; ++i) sum = sum + a[i] * b[i];
    return sum;
}

// An array of them, aligned (a vector's attributes do not survive being a template's argument).
class Vecs {
  public:
    explicit Vecs(uint64_t n) : data_(static_cast<Vec*>(::operator new(n * sizeof(Vec), std::align_val_t{64}))) {}
    Vecs(const Vecs&) = delete;
    Vecs& operator=(const Vecs&) = delete;
    ~Vecs() { ::operator delete(data_, std::align_val_t{64}); }
    Vec* data() { return data_; }
    Vec& operator[](uint64_t i) { return data_[i]; }

  private:
    Vec* data_;
};

// Memory of one thread's work on W groups of N points of D values.
struct Room {
    uint64_t N, D, S, p;  // S: the smaller of N and D
    Vecs points, centred, gram, vectors, found, stored, right, small;

    Room(uint64_t n, uint64_t d, uint64_t n_directions)
        : N(n), D(d), S(std::min(n, d)), p(n_directions), points(n * d), centred(n * d), gram(S * S), vectors(S * S),
          found(p * d), stored(p * d), right(p * n), small(p * p) {}
};

// Eigenvectors of the symmetric S × S matrix `a`, which is used up: row i of `v` belongs to what is
// left at a[i, i]. Cyclic Jacobi; a rotation that would change nothing is left out, so a lane's result
// does not depend on how long the others take.
RMM_INLINE void eigen(Vec* a, Vec* v, uint64_t S) {
    for (uint64_t i = 0; i < S * S; ++i) v[i] = all(0);
    for (uint64_t i = 0; i < S; ++i) v[i * S + i] = all(1);
    for (unsigned sweep = 0; sweep < MOST_SWEEPS; ++sweep) {
        bool rotated = false;
        for (uint64_t i = 0; i + 1 < S; ++i) {
            for (uint64_t j = i + 1; j < S; ++j) {
                const Vec off = a[i * S + j], low = a[i * S + i], high = a[j * S + j];
                // Against the two diagonal entries: small directions are found as exactly as large ones.
                const Mask needed = off * off > all(1e-20) * magnitude(low * high);
                if (!any(needed)) continue;
                rotated = true;
                const Vec safe = where(needed, off, all(1));
                const Vec theta = (high - low) / (all(2) * safe);
                const Vec size = all(1) / (magnitude(theta) + root(theta * theta + all(1)));
                const Vec signed_size = where(all(0) > theta, all(0) - size, size);
                const Vec t = where(needed, signed_size, all(0));
                const Vec c = all(1) / root(t * t + all(1)), s = t * c;
                a[i * S + i] = low - t * where(needed, off, all(0));
                a[j * S + j] = high + t * where(needed, off, all(0));
                a[i * S + j] = a[j * S + i] = where(needed, all(0), off);
                for (uint64_t k = 0; k < S; ++k) {
                    if (k != i && k != j) {
                        const Vec x = a[k * S + i], y = a[k * S + j];
                        a[i * S + k] = a[k * S + i] = c * x - s * y;
                        a[j * S + k] = a[k * S + j] = s * x + c * y;
                    }
                    const Vec x = v[i * S + k], y = v[j * S + k];
                    v[i * S + k] = c * x - s * y;
                    v[j * S + k] = s * x + c * y;
                }
            }
        }
        if (!rotated) return;
    }
}

// Norm 1; a row of zeros stays one. Scaled by the largest entry first, so that squares of tiny values
// do not vanish.
RMM_INLINE void to_unit(Vec* row, uint64_t n) {
    Vec top = all(0);
    for (uint64_t d = 0; d < n; ++d) {
        const Vec size = magnitude(row[d]);
        top = where(size > top, size, top);
    }
    top = where(top > all(0), top, all(1));
    for (uint64_t d = 0; d < n; ++d) row[d] = row[d] / top;
    const Vec square = dot(row, row, n);
    const Vec norm = where(square > all(0), root(square), all(1));
    for (uint64_t d = 0; d < n; ++d) row[d] = row[d] / norm;
}

// Gram–Schmidt, two passes: directions of little energy, computed through the Gram matrix, lean on the
// larger ones by rounding. One that the second pass shortens again was nothing but rounding.
RMM_INLINE void orthonormalise(Vec* rows, uint64_t p, uint64_t n) {
    for (uint64_t j = 0; j < p; ++j) {
        Vec* row = rows + j * n;
        to_unit(row, n);
        Mask kept = all(1) > all(0);
        for (unsigned pass = 0; pass < 2 && j > 0; ++pass) {
            for (uint64_t i = 0; i < j; ++i) {
                const Vec along = dot(rows + i * n, row, n);
                for (uint64_t d = 0; d < n; ++d) row[d] = row[d] - along * rows[i * n + d];
            }
            kept = dot(row, row, n) > all(0.25);
            to_unit(row, n);
        }
        for (uint64_t d = 0; d < n; ++d) row[d] = where(kept, row[d], all(0));
    }
}

// Into room.found: the p directions of most energy of room.centred, orthonormal.
RMM_INLINE void directions(Room& room) {
    const uint64_t N = room.N, D = room.D, S = room.S, p = room.p;
    const bool by_point = N <= D;
    const Vec* x = room.centred.data();
    Vec* gram = room.gram.data();
    for (uint64_t i = 0; i < S; ++i) {
        for (uint64_t j = i; j < S; ++j) {
            Vec sum = all(0);
            if (by_point) {
                sum = dot(x + i * D, x + j * D, D);
            } else {
                for (uint64_t t = 0; t < N; ++t) sum = sum + x[t * D + i] * x[t * D + j];
            }
            gram[i * S + j] = gram[j * S + i] = sum;
        }
    }
    eigen(gram, room.vectors.data(), S);
    // The p largest of each lane; of equal ones the first.
    uint64_t order[W][MOST_SMALLER_SIDE];
    RMM_LANES {
        for (uint64_t i = 0; i < S; ++i) order[l][i] = i;
        std::stable_sort(order[l], order[l] + S, [&](uint64_t a, uint64_t b) {
            return gram[a * S + a][l] > gram[b * S + b][l];
        });
    }
    for (uint64_t j = 0; j < p; ++j) {
        Vec* to = room.found.data() + j * D;
        if (!by_point) {
            for (uint64_t d = 0; d < D; ++d) RMM_LANES to[d][l] = room.vectors[order[l][j] * S + d][l];
            continue;
        }
        for (uint64_t d = 0; d < D; ++d) to[d] = all(0);
        for (uint64_t t = 0; t < N; ++t) {  // from points to values: uᵀX = s vᵀ
            Vec weight;
            RMM_LANES weight[l] = room.vectors[order[l][j] * S + t][l];
            for (uint64_t d = 0; d < D; ++d) to[d] = to[d] + weight * x[t * D + d];
        }
    }
    if (by_point) orthonormalise(room.found.data(), p, D);
}

// What of room.found is more than noise, its largest entry positive, as f32: into room.stored. The
// Gram matrix cannot tell energies below 1e-16 of the largest from nothing, but the energy measured
// along a direction can.
RMM_INLINE void round_directions(Room& room, const Vec& floor) {
    const uint64_t N = room.N, D = room.D;
    for (uint64_t j = 0; j < room.p; ++j) {
        const Vec* row = room.found.data() + j * D;
        Vec energy = all(0), top = all(0), sign = all(1);
        for (uint64_t t = 0; t < N; ++t) {
            const Vec along = dot(row, room.centred.data() + t * D, D);
            energy = energy + along * along;
        }
        for (uint64_t d = 0; d < D; ++d) {
            const Mask larger = magnitude(row[d]) > top;
            top = where(larger, magnitude(row[d]), top);
            sign = where(larger, where(all(0) > row[d], all(-1), all(1)), sign);
        }
        sign = where(energy > floor, sign, all(0));
        Vec* to = room.stored.data() + j * D;
        for (uint64_t d = 0; d < D; ++d) {
            to[d] = rounded_to_f32(row[d] * sign) + all(0);  // no negative zeros
        }
    }
}

// Least squares of the points in room.points on room.stored: into room.right (p, N). The directions are
// orthonormal to f32 rounding, so elimination needs no pivots; a direction of zeros gets zeros.
RMM_INLINE void fit(Room& room) {
    const uint64_t N = room.N, D = room.D, p = room.p;
    Vec *gram = room.small.data(), *right = room.right.data();
    for (uint64_t i = 0; i < p; ++i) {
        const Vec* row = room.stored.data() + i * D;
        for (uint64_t j = 0; j < p; ++j) gram[i * p + j] = dot(row, room.stored.data() + j * D, D);
        gram[i * p + i] = where(gram[i * p + i] > all(0), gram[i * p + i], all(1));
        for (uint64_t t = 0; t < N; ++t) right[i * N + t] = dot(row, room.points.data() + t * D, D);
    }
    for (uint64_t i = 0; i < p; ++i) {
        for (uint64_t k = i + 1; k < p; ++k) {
            const Vec part = gram[k * p + i] / gram[i * p + i];
            for (uint64_t j = i; j < p; ++j) gram[k * p + j] = gram[k * p + j] - part * gram[i * p + j];
            for (uint64_t t = 0; t < N; ++t) right[k * N + t] = right[k * N + t] - part * right[i * N + t];
        }
    }
    for (uint64_t i = p; i-- > 0;) {
        for (uint64_t t = 0; t < N; ++t) {
            Vec sum = right[i * N + t];
            for (uint64_t k = i + 1; k < p; ++k) sum = sum - gram[i * p + k] * right[k * N + t];
            right[i * N + t] = sum / gram[i * p + i];
        }
    }
}

// W groups of m positions, the first one starting at `at`; lanes from `n_lanes` on repeat the last.
RMM_CLONES
bool work_on(Room& room, const Stack& stack, uint64_t at, uint64_t m, unsigned n_lanes, uint64_t group_number,
             uint64_t n_groups, uint64_t p_stored, bool centred, const SharedPart& shared) {
    const uint64_t N = room.N, D = room.D, p = room.p, L = stack.length;
    uint64_t start[W];
    RMM_LANES start[l] = at + std::min(l, n_lanes - 1) * m;
    Vec energy = all(0), bad = all(0);
    for (uint64_t k = 0; k < stack.rank; ++k) {
        for (uint64_t c = 0; c < m; ++c) {
            const uint64_t d = k * m + c;
            Vec mean = all(0);
            for (uint64_t t = 0; t < N; ++t) {
                const double* row = stack.values + (t * stack.rank + k) * L + c;
                Vec& value = room.points[t * D + d];
                RMM_LANES value[l] = row[start[l]];
                mean = mean + value;
                energy = energy + value * value;
            }
            mean = centred ? mean / all(static_cast<double>(N)) : all(0);
            const Vec rounded = rounded_to_f32(mean);
            for (unsigned l = 0; l < n_lanes; ++l) shared.mean[k * L + start[l] + c] = static_cast<float>(rounded[l]);
            for (uint64_t t = 0; t < N; ++t) {
                Vec& value = room.points[t * D + d];
                room.centred[t * D + d] = value - mean;
                value = value - rounded;
                RMM_LANES bad[l] += std::fabs(value[l]) <= 3.4028234663852886e38 ? 0 : 1;
            }
        }
    }
    if (any(bad > all(0))) return false;
    if (p == 0) return true;
    directions(room);
    round_directions(room, energy * all(NOISE * NOISE));
    fit(room);
    bool fits = true;
    for (unsigned l = 0; l < n_lanes; ++l) {
        for (uint64_t j = 0; j < p; ++j) {
            for (uint64_t k = 0; k < stack.rank; ++k) {
                float* to = shared.basis + (j * stack.rank + k) * L + start[l];
                for (uint64_t c = 0; c < m; ++c) to[c] = static_cast<float>(room.stored[j * D + k * m + c][l]);
            }
            for (uint64_t t = 0; t < N; ++t) {
                const float value = static_cast<float>(room.right[j * N + t][l]);
                fits = fits && std::fabs(value) <= 3.40282347e38f;
                shared.coefficients[(t * p_stored + j) * n_groups + group_number + l] = value;
            }
        }
    }
    return fits;
}

}  // namespace

bool find_principal(const Stack& stack, uint64_t group, uint64_t p, bool centred, uint32_t n_threads,
                    const SharedPart& shared) {
    const uint64_t n_groups = ceil_div(stack.length, group), n_whole = stack.length / group;
    const uint64_t n_units = ceil_div(n_groups, GROUPS_OF_UNIT);
    std::fill(shared.mean, shared.mean + stack.rank * stack.length, 0.0f);
    std::fill(shared.basis, shared.basis + p * stack.rank * stack.length, 0.0f);
    std::fill(shared.coefficients, shared.coefficients + stack.n * p * n_groups, 0.0f);
    // Directions that points of so many values can have.
    auto most = [&](uint64_t m) {
        return std::min({p, centred ? stack.n - 1 : stack.n, stack.rank * m});
    };
    std::atomic<bool> good{true};
    n_threads = choose_threads(n_threads, 8 * stack.n * stack.rank * stack.length, n_units);
    in_parallel(n_threads, n_units, [&](const NextUnit& next) {
        Room room(stack.n, stack.rank * group, most(group));
        uint64_t unit;
        while (next(unit)) {
            const uint64_t last = std::min((unit + 1) * GROUPS_OF_UNIT, n_groups);
            for (uint64_t g = unit * GROUPS_OF_UNIT; g < last;) {
                if (g == n_whole) {  // what is left behind the whole groups
                    const uint64_t m = stack.length - g * group;
                    Room rest(stack.n, stack.rank * m, most(m));
                    if (!work_on(rest, stack, g * group, m, 1, g, n_groups, p, centred, shared)) good = false;
                    break;
                }
                const unsigned n_lanes = static_cast<unsigned>(std::min<uint64_t>(W, std::min(last, n_whole) - g));
                if (!work_on(room, stack, g * group, group, n_lanes, g, n_groups, p, centred, shared)) good = false;
                g += n_lanes;
            }
        }
    });
    return good;
}

}  // namespace rmm
