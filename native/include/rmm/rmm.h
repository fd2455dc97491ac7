/*
 * rmm.h: read `.rmm` collections of low-rank adapters from C.
 *
 * Conventions
 *   - Every function that can fail returns an rmm_status and, if the caller passes a non-null
 *     rmm_error, fills it. On failure no output parameter but the error is written.
 *   - The library never logs, never aborts, never throws across this interface, and never hands out
 *     memory that the caller must free, except the handle, which rmm_close() takes back.
 *   - Strings are UTF-8 and NUL-ended. Those that functions give out live in the opened bytes: they
 *     are valid until rmm_close().
 *   - A handle may be used by any number of threads at once; rmm_close() must be the last call.
 *   - Structs that may grow are passed with their size, so a program built against an older header
 *     keeps working with a newer library: the library writes no more than that size, and zeroes
 *     what it does not know.
 *   - Offsets are bytes from the start of the file. "RMM-nnn" are the rules of the specification.
 *   - Tasks, targets, and the entries and private tensors of a task, are numbered from 0.
 *   - Every function may answer RMM_BAD_ARGUMENT (a null pointer, a code that does not exist),
 *     RMM_NO_MEMORY and RMM_INTERNAL; "Fails with" below names what else it may answer.
 *   - A file that is open may grow: the handle keeps the version that it opened. A file that is cut
 *     short or overwritten while it is mapped ends the program, as with any mapping (SIGBUS); for
 *     files that others may so damage, read the bytes and use rmm_open_memory().
 *
 * Factors come in PEFT's orientation, row-major: A is (rank, n_in), B is (n_out, rank). The scale is
 * not folded in: delta = scale * B @ A.
 */
#ifndef RMM_RMM_H
#define RMM_RMM_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(RMM_SHARED)
#ifdef RMM_BUILDING
#define RMM_API __declspec(dllexport)
#else
#define RMM_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define RMM_API __attribute__((visibility("default")))
#else
#define RMM_API
#endif

#ifdef __cplusplus
#define RMM_NOEXCEPT noexcept
extern "C" {
#else
#define RMM_NOEXCEPT
#endif

/*
 * The version of this interface; rmm_abi_version() tells that of the library in use. Within one
 * version functions, statuses and fields at the end of structs are added, and nothing else changes.
 */
#define RMM_ABI_VERSION 1

/* What rmm_error.offset is where no place in the file is meant. */
#define RMM_NO_OFFSET UINT64_MAX

/* Outcomes. The values are fixed; new ones join their decade. */
typedef enum rmm_status {
    RMM_OK = 0,

    RMM_NOT_RMM = 10, /* not an .rmm file at all (RMM-001) */

    RMM_MALFORMED = 20, /* a header, table or record breaks the rule in rmm_error.rule */
    RMM_TRUNCATED = 21, /* the file ends before something that it announces */
    RMM_CHECKSUM = 22,  /* a stored and a computed CRC32C differ */

    RMM_UNSUPPORTED_VERSION = 30,  /* another major version, or a feature bit (RMM-002, RMM-003) */
    RMM_UNSUPPORTED_SECTION = 31,  /* an unknown critical section (RMM-023) */
    RMM_UNSUPPORTED_KIND = 32,     /* an unknown kind of target (RMM-036) */
    RMM_UNSUPPORTED_ENCODING = 33, /* an array with an unknown encoding (RMM-088) */

    RMM_NO_TASK = 40,    /* no task of that name or number */
    RMM_NO_ENTRY = 41,   /* the task has no entry of that target or number */
    RMM_NO_TARGET = 42,  /* no target of that number */

    RMM_BAD_ARGUMENT = 50,     /* a null pointer, an unknown dtype or factor, ... */
    RMM_BUFFER_TOO_SMALL = 51, /* the caller's memory does not hold the result */
    RMM_STOPPED = 52,          /* the caller's callback asked to stop */

    RMM_IO = 60,        /* the operating system refused; see rmm_error.os_error */
    RMM_NO_MEMORY = 61, /* an allocation failed */

    RMM_INTERNAL = 90 /* a fault of this library */
} rmm_status;

/*
 * What went wrong, or RMM_OK and an empty message. Written by every function that takes one, so it
 * needs no initialisation. Its size is fixed for the life of RMM_ABI_VERSION 1.
 */
typedef struct rmm_error {
    int32_t status;    /* an rmm_status */
    int32_t rule;      /* 17 for RMM-017; 0 if no rule applies */
    uint64_t offset;   /* where in the file; RMM_NO_OFFSET if nowhere */
    int32_t os_error;  /* errno, or GetLastError() on Windows; 0 if none */
    int32_t reserved;  /* 0 */
    char message[488]; /* what, got, expected, where: one line of UTF-8, NUL-ended */
} rmm_error;

/*
 * Dtypes (codes of the specification's registry). Factors are given out as one of these three,
 * rounded to nearest, ties to even, whatever the original had. Private tensors keep their own, which
 * may also be 4 f64, 5 i8, 6 u8, 7 i16, 8 u16, 9 i32, 10 u32, 11 i64, 12 u64, 13 bool, 14 f8_e4m3,
 * 15 f8_e5m2 or 16 c64.
 */
#define RMM_F32 1
#define RMM_F16 2
#define RMM_BF16 3

/* Factors: A is (rank, n_in), B is (n_out, rank). */
#define RMM_FACTOR_A 0
#define RMM_FACTOR_B 1

/* Kinds of target. */
#define RMM_KIND_LINEAR 0
#define RMM_KIND_EMBEDDING 1   /* A is (rank, vocabulary), B is (width, rank) */
#define RMM_KIND_CONVOLUTION 2 /* n_in is A's in-channels times the kernel sizes */

/* Bit of rmm_target_info.flags: the base stores the weight as (n_in, n_out), as GPT-2 does. */
#define RMM_FLAG_TRANSPOSED 1

/* Roles of private tensors; take an unknown one for RMM_ROLE_OTHER. */
#define RMM_ROLE_OTHER 0
#define RMM_ROLE_MODULE 1      /* a whole parameter of the model: a head, an embedding, a norm */
#define RMM_ROLE_BIAS 2        /* bias of an adapted module */
#define RMM_ROLE_FACTOR_BIAS 3 /* added by factor B itself */
#define RMM_ROLE_MAGNITUDE 4   /* DoRA */
#define RMM_ROLE_ROWS 5        /* replaced rows of an embedding */

/*
 * An open collection: the bytes and their checked index. rmm_open() and rmm_open_memory() make one,
 * rmm_close() takes it back. All other functions only read it.
 */
typedef struct rmm_file rmm_file;

/* An open file as a whole. */
typedef struct rmm_file_info {
    const uint8_t *data;   /* the bytes of the file, read-only */
    uint64_t n_bytes;      /* size of the file */
    uint64_t file_length;  /* bytes that the collection takes; what lies behind is scratch */
    uint64_t sequence;     /* counts the changes of the collection since its first write */
    uint64_t index_offset; /* the index is one range: */
    uint64_t index_length;
    uint64_t n_tasks;
    uint64_t n_targets; /* different targets of all tasks */
    uint64_t n_entries; /* pairs of a task and a target of it */
    uint64_t n_frames;  /* what tasks share: a mean and a basis of one target, or of part of one */
    uint32_t minor;        /* minor version of the file */
    int32_t active_slot;   /* 0 or 1 */
    int32_t damaged_slot;  /* 1 if the other slot is neither empty nor valid (RMM-012) */
    int32_t reserved;      /* 0 */
} rmm_file_info;

/* One task of a collection. */
typedef struct rmm_task_info {
    const char *name;
    uint64_t n_entries;  /* targets that the task has */
    uint64_t n_privates; /* private tensors */
    uint64_t n_values;   /* sum of rank * (n_in + n_out) */
    uint64_t run_offset; /* the task's own bytes are one range */
    uint64_t run_length;
} rmm_task_info;

/* A weight of the base model that tasks change. */
typedef struct rmm_target_info {
    const char *name;   /* the module's name in the base model */
    uint64_t n_in;      /* long side of A */
    uint64_t n_out;     /* long side of B */
    uint16_t kernel[3]; /* convolutions: sizes of 1 to 3 kernel axes, then zeros; else zeros */
    uint8_t kind;       /* an RMM_KIND_ */
    uint8_t flags;      /* RMM_FLAG_TRANSPOSED or 0 */
    uint32_t reserved;  /* 0 */
} rmm_target_info;

/* What a task stores at one target. */
typedef struct rmm_entry_info {
    const char *target; /* name of the target; n_in to flags as in rmm_target_info */
    uint64_t n_in;
    uint64_t n_out;
    double scale;       /* delta = scale * B @ A */
    uint64_t offset_a; /* where A and B go in the arena; multiples of 64 */
    uint64_t offset_b;
    uint64_t n_bytes_a; /* bytes of A and B in the arena */
    uint64_t n_bytes_b;
    uint32_t target_id; /* number of the target */
    uint32_t rank;      /* rows of A, columns of B */
    uint16_t kernel[3];
    uint8_t kind;
    uint8_t flags;
    uint8_t dtype_a; /* dtypes of the original's factors */
    uint8_t dtype_b;
    uint8_t reserved[6]; /* 0 */
} rmm_entry_info;

/* A tensor that a task carries outside its factors, kept exactly: a head, a bias. */
typedef struct rmm_private_info {
    const char *name;    /* its name in the base model */
    const uint8_t *data; /* its bytes, little-endian, row-major, in the opened file: read-only */
    uint64_t offset;     /* where they are in the file */
    uint64_t n_bytes;    /* product of the shape, times the size of the dtype */
    uint64_t shape[8];   /* n_dims sizes, then zeros */
    uint8_t n_dims;      /* 0 to 8 */
    uint8_t dtype;       /* code of the specification's registry */
    uint8_t role;        /* an RMM_ROLE_ */
    uint8_t reserved[5]; /* 0 */
} rmm_private_info;

/* A rule of the specification that a file breaks. */
typedef struct rmm_violation {
    int32_t rule;        /* 17 for RMM-017 */
    int32_t status;      /* the rmm_status with which a reader answers it */
    uint64_t offset;     /* where; RMM_NO_OFFSET if nowhere */
    const char *message; /* one line of UTF-8; valid during the call */
} rmm_violation;

/*
 * Called once a violation, in the calling thread, with the caller's `user`; any result but 0 stops.
 * It must return: neither longjmp() nor exceptions may leave it.
 */
typedef int (*rmm_violation_callback)(void *user, const rmm_violation *violation);

/* --- library ------------------------------------------------------------------------------- */

/* Version of the library, "0.1.0". */
RMM_API const char *rmm_version(void) RMM_NOEXCEPT;

/* RMM_ABI_VERSION of the library in use. */
RMM_API uint32_t rmm_abi_version(void) RMM_NOEXCEPT;

/* "RMM_MALFORMED" for 20, and so on; "unknown status" for another value. */
RMM_API const char *rmm_status_name(int32_t status) RMM_NOEXCEPT;

/*
 * CRC32C (Castagnoli, as in iSCSI) of n_bytes bytes, continued from crc, the result for the bytes
 * before them (0: none). Null data give crc.
 */
RMM_API uint32_t rmm_crc32c(uint32_t crc, const void *data, uint64_t n_bytes) RMM_NOEXCEPT;

/* --- opening --------------------------------------------------------------------------------- */

/*
 * Map a file and check header and index: every rule that the specification marks "open". Costs time
 * in proportion to the index; the payload is not touched. path is UTF-8. *out receives the handle.
 * The file may be replaced or deleted afterwards; the mapping stays.
 *
 * Fails with RMM_IO, RMM_NOT_RMM, RMM_MALFORMED, RMM_TRUNCATED, RMM_CHECKSUM (of the index),
 * RMM_UNSUPPORTED_*.
 */
RMM_API rmm_status rmm_open(const char *path, rmm_file **out, rmm_error *error) RMM_NOEXCEPT;

/* As rmm_open(), of bytes in memory, which must stay, unchanged, until rmm_close(). */
RMM_API rmm_status rmm_open_memory(const void *data, uint64_t n_bytes, rmm_file **out,
                                   rmm_error *error) RMM_NOEXCEPT;

/*
 * Give the handle back. Null is allowed. Strings and tensors that point into the file end with it;
 * loaded factors, which are the caller's memory, do not.
 */
RMM_API void rmm_close(rmm_file *file) RMM_NOEXCEPT;

/* --- looking --------------------------------------------------------------------------------- */

/*
 * Describe an open file: the first struct_size bytes of *info are written. Here and below,
 * struct_size is sizeof the caller's struct (of one element, for arrays), at least 8.
 */
RMM_API rmm_status rmm_get_file_info(const rmm_file *file, size_t struct_size, rmm_file_info *info,
                                     rmm_error *error) RMM_NOEXCEPT;

/* Number of tasks, and of targets of all tasks together; 0 for a null handle. */
RMM_API uint64_t rmm_n_tasks(const rmm_file *file) RMM_NOEXCEPT;
RMM_API uint64_t rmm_n_targets(const rmm_file *file) RMM_NOEXCEPT;

/* Name of a task; null if there is none of that number. Tasks ascend by the bytes of names. */
RMM_API const char *rmm_task_name(const rmm_file *file, uint64_t task) RMM_NOEXCEPT;

/* Number of the task of that name (a binary search) into *task. Fails with RMM_NO_TASK. */
RMM_API rmm_status rmm_find_task(const rmm_file *file, const char *name, uint64_t *task,
                                 rmm_error *error) RMM_NOEXCEPT;

/* Describe a task. Fails with RMM_NO_TASK. */
RMM_API rmm_status rmm_get_task_info(const rmm_file *file, uint64_t task, size_t struct_size,
                                     rmm_task_info *info, rmm_error *error) RMM_NOEXCEPT;

/* Describe a target. Fails with RMM_NO_TARGET. */
RMM_API rmm_status rmm_get_target_info(const rmm_file *file, uint64_t target, size_t struct_size,
                                       rmm_target_info *info, rmm_error *error) RMM_NOEXCEPT;

/*
 * All entries of a task, in order: element i of infos, an array of `capacity` structs of struct_size
 * bytes each, is entry i (get the number from rmm_get_task_info). arena_bytes receives the size of
 * an arena that holds all factors in the given output dtype, a multiple of 64. infos may be null
 * with capacity 0, arena_bytes may be null. Entries ascend by the names of their targets.
 *
 * Fails with RMM_NO_TASK; RMM_BUFFER_TOO_SMALL if capacity is less than the task has.
 */
RMM_API rmm_status rmm_get_entries(const rmm_file *file, uint64_t task, int32_t dtype,
                                   size_t struct_size, rmm_entry_info *infos, uint64_t capacity,
                                   uint64_t *arena_bytes, rmm_error *error) RMM_NOEXCEPT;

/* Number of the task's entry whose target has that name. Fails with RMM_NO_TASK, RMM_NO_ENTRY. */
RMM_API rmm_status rmm_find_entry(const rmm_file *file, uint64_t task, const char *target,
                                  uint64_t *entry, rmm_error *error) RMM_NOEXCEPT;

/*
 * All private tensors of a task, in ascending order of their names, into an array as for
 * rmm_get_entries(). Their bytes are not copied: data points into the file.
 *
 * Fails with RMM_NO_TASK, RMM_BUFFER_TOO_SMALL.
 */
RMM_API rmm_status rmm_get_privates(const rmm_file *file, uint64_t task, size_t struct_size,
                                    rmm_private_info *infos, uint64_t capacity,
                                    rmm_error *error) RMM_NOEXCEPT;

/* --- loading --------------------------------------------------------------------------------- */

/*
 * Reconstruct every factor of a task into an arena of the caller's, at the offsets that
 * rmm_get_entries gives for the same dtype; bytes between factors are not written. The arena needs
 * no alignment, though 64 bytes are fastest. n_threads 0 lets the library choose; small tasks are
 * loaded by the calling thread alone. The bits do not depend on the machine or the threads.
 * On failure the arena's content is undefined.
 *
 * Checksums of the payload are not compared, which is what rmm_check_task() does.
 *
 * Fails with RMM_NO_TASK, RMM_BUFFER_TOO_SMALL, RMM_UNSUPPORTED_ENCODING, RMM_MALFORMED (a coded
 * run that is not well formed).
 */
RMM_API rmm_status rmm_load_task(const rmm_file *file, uint64_t task, int32_t dtype, void *arena,
                                 uint64_t arena_bytes, uint32_t n_threads,
                                 rmm_error *error) RMM_NOEXCEPT;

/*
 * Reconstruct one factor (RMM_FACTOR_A or RMM_FACTOR_B) of one entry into memory of the caller's:
 * rank * n_in or n_out * rank values of the given dtype, without gaps, the same bits as
 * rmm_load_task() gives.
 *
 * Fails as rmm_load_task(), and with RMM_NO_ENTRY.
 */
RMM_API rmm_status rmm_load_factor(const rmm_file *file, uint64_t task, uint64_t entry,
                                   int32_t factor, int32_t dtype, void *out, uint64_t out_bytes,
                                   rmm_error *error) RMM_NOEXCEPT;

/* --- checking -------------------------------------------------------------------------------- */

/*
 * Compare the checksums of all payload that the task uses: entries, frames, private tensors. Reads
 * it all; for files that may have been damaged, once after opening.
 *
 * Fails with RMM_NO_TASK, RMM_CHECKSUM.
 */
RMM_API rmm_status rmm_check_task(const rmm_file *file, uint64_t task,
                                  rmm_error *error) RMM_NOEXCEPT;

/*
 * Check every rule over every byte and call back for each violation; n_violations (may be null)
 * receives their number. RMM_OK means that the check ran, not that the file is valid. After 1,000
 * violations of one rule further ones of that rule are counted but not reported. RMM-091 needs the
 * JSON schema and is not checked here. A file that is being grown is looked at again until a whole
 * version of it is found. callback may be null, to count only.
 *
 * Fails with RMM_IO; RMM_STOPPED if the callback asks for it, with n_violations written so far.
 */
RMM_API rmm_status rmm_validate(const char *path, rmm_violation_callback callback, void *user,
                                uint64_t *n_violations, rmm_error *error) RMM_NOEXCEPT;

/* As rmm_validate, of an open file: of the version that was opened, also if the file grew since. */
RMM_API rmm_status rmm_validate_file(const rmm_file *file, rmm_violation_callback callback,
                                     void *user, uint64_t *n_violations,
                                     rmm_error *error) RMM_NOEXCEPT;

/* As rmm_validate, of bytes in memory. */
RMM_API rmm_status rmm_validate_memory(const void *data, uint64_t n_bytes,
                                       rmm_violation_callback callback, void *user,
                                       uint64_t *n_violations, rmm_error *error) RMM_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif /* RMM_RMM_H */
