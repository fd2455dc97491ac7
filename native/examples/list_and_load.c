/*
 * list_and_load FILE [TASK]: lists the tasks and targets of a collection; with the name of a task,
 * loads it and prints the CRC32C of every factor.
 *
 * Exit code 0 if all went well, 1 if not, 2 for a wrong call, 3 for a malformed file, 4 for an
 * unsupported one.
 */
#include <stdio.h>
#include <stdlib.h>

#include "rmm/rmm.h"

static int exit_code(int32_t status) {
    if (status == RMM_OK) return 0;
    if (status / 10 == 1 || status / 10 == 2) return 3;
    if (status / 10 == 3) return 4;
    return 1;
}

static int complain(const rmm_error *error) {
    fprintf(stderr, "error: %s", error->message);
    if (error->rule != 0) fprintf(stderr, " (RMM-%03d)", (int)error->rule);
    if (error->offset != RMM_NO_OFFSET) fprintf(stderr, " at offset %llu", (unsigned long long)error->offset);
    fputc('\n', stderr);
    return exit_code(error->status);
}

static int list(const rmm_file *file) {
    rmm_error error;
    uint64_t i;
    for (i = 0; i < rmm_n_tasks(file); ++i) {
        rmm_task_info task;
        if (rmm_get_task_info(file, i, sizeof task, &task, &error) != RMM_OK) return complain(&error);
        printf("task %s: %llu targets, %llu private tensors, %llu values from %llu bytes\n", task.name,
               (unsigned long long)task.n_entries, (unsigned long long)task.n_privates,
               (unsigned long long)task.n_values, (unsigned long long)task.run_length);
    }
    for (i = 0; i < rmm_n_targets(file); ++i) {
        rmm_target_info target;
        if (rmm_get_target_info(file, i, sizeof target, &target, &error) != RMM_OK) return complain(&error);
        printf("target %s: %llu to %llu\n", target.name, (unsigned long long)target.n_in,
               (unsigned long long)target.n_out);
    }
    return 0;
}

static int load(const rmm_file *file, uint64_t task) {
    rmm_error error;
    rmm_task_info info;
    rmm_entry_info *entries = NULL;
    rmm_private_info *privates = NULL;
    unsigned char *arena = NULL;
    uint64_t n_bytes, i;
    int code = 1;

    if (rmm_get_task_info(file, task, sizeof info, &info, &error) != RMM_OK) return complain(&error);
    entries = calloc((size_t)info.n_entries + 1, sizeof *entries);
    privates = calloc((size_t)info.n_privates + 1, sizeof *privates);
    if (entries == NULL || privates == NULL) goto done;
    if (rmm_get_entries(file, task, RMM_F32, sizeof *entries, entries, info.n_entries, &n_bytes, &error) != RMM_OK ||
        rmm_get_privates(file, task, sizeof *privates, privates, info.n_privates, &error) != RMM_OK) {
        code = complain(&error);
        goto done;
    }
    arena = malloc((size_t)n_bytes + 1);
    if (arena == NULL) goto done;
    if (rmm_load_task(file, task, RMM_F32, arena, n_bytes, 0, &error) != RMM_OK) {
        code = complain(&error);
        goto done;
    }
    for (i = 0; i < info.n_entries; ++i) {
        const rmm_entry_info *entry = &entries[i];
        printf("%s: rank %u, scale %g, A %08x, B %08x\n", entry->target, (unsigned)entry->rank, entry->scale,
               (unsigned)rmm_crc32c(0, arena + entry->offset_a, entry->n_bytes_a),
               (unsigned)rmm_crc32c(0, arena + entry->offset_b, entry->n_bytes_b));
    }
    for (i = 0; i < info.n_privates; ++i) {
        printf("private %s: %llu bytes, %08x\n", privates[i].name, (unsigned long long)privates[i].n_bytes,
               (unsigned)rmm_crc32c(0, privates[i].data, privates[i].n_bytes));
    }
    code = 0;
done:
    if (code == 1) fputs("error: not enough memory\n", stderr);
    free(arena);
    free(privates);
    free(entries);
    return code;
}

int main(int argc, char **argv) {
    rmm_file *file;
    rmm_error error;
    uint64_t task;
    int code;
    if (argc != 2 && argc != 3) {
        fprintf(stderr, "usage: %s FILE [TASK]\n", argv[0]);
        return 2;
    }
    if (rmm_open(argv[1], &file, &error) != RMM_OK) return complain(&error);
    if (argc == 2) {
        code = list(file);
    } else if (rmm_find_task(file, argv[2], &task, &error) != RMM_OK) {
        code = complain(&error);
    } else {
        code = load(file, task);
    }
    rmm_close(file);
    return code;
}
