/*
 * check: the conformance runner on the C interface.
 *
 *   check FILE          every violation as "RMM-nnn offset message", then the verdict
 *   check --open FILE   what a reader says: opens the file and loads every task
 *
 * The last line is "valid", "malformed" or "unsupported"; exit code 0, 3 or 4; 1 if the file cannot
 * be read at all, 2 for a wrong call.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rmm/rmm.h"

struct counts {
    unsigned long malformed;
    unsigned long unsupported;
};

static int is_unsupported(int32_t status) { return status >= 30 && status < 40; }

static int print(void *user, const rmm_violation *violation) {
    struct counts *counts = user;
    if (is_unsupported(violation->status)) {
        ++counts->unsupported;
    } else {
        ++counts->malformed;
    }
    printf("RMM-%03d %llu %s\n", (int)violation->rule, (unsigned long long)violation->offset, violation->message);
    return 0;
}

static int verdict(const struct counts *counts) {
    const char *word = counts->malformed ? "malformed" : counts->unsupported ? "unsupported" : "valid";
    puts(word);
    return counts->malformed ? 3 : counts->unsupported ? 4 : 0;
}

static int answer(const rmm_error *error, const char *path) {
    struct counts counts = {0, 0};
    rmm_violation violation;
    if (error->rule == 0) {
        fprintf(stderr, "%s: %s (%s)\n", path, error->message, rmm_status_name(error->status));
        return 1;
    }
    violation.rule = error->rule;
    violation.status = error->status;
    violation.offset = error->offset;
    violation.message = error->message;
    print(&counts, &violation);
    return verdict(&counts);
}

static int open_and_load(const char *path) {
    rmm_file *file;
    rmm_error error;
    struct counts none = {0, 0};
    uint64_t task;
    if (rmm_open(path, &file, &error) != RMM_OK) return answer(&error, path);
    for (task = 0; task < rmm_n_tasks(file); ++task) {
        uint64_t n_bytes = 0;
        void *arena = NULL;
        rmm_status status = rmm_get_entries(file, task, RMM_F32, 0, NULL, 0, &n_bytes, &error);
        if (status == RMM_OK) {
            arena = malloc(n_bytes ? (size_t)n_bytes : 1);
            if (arena == NULL) {
                fprintf(stderr, "%s: no memory for %llu bytes\n", path, (unsigned long long)n_bytes);
                rmm_close(file);
                return 1;
            }
            status = rmm_load_task(file, task, RMM_F32, arena, n_bytes, 0, &error);
            free(arena);
        }
        if (status != RMM_OK) {
            rmm_close(file);
            return answer(&error, path);
        }
    }
    rmm_close(file);
    return verdict(&none);
}

int main(int argc, char **argv) {
    struct counts counts = {0, 0};
    rmm_error error;
    if (argc == 3 && strcmp(argv[1], "--open") == 0) return open_and_load(argv[2]);
    if (argc != 2) {
        fprintf(stderr, "usage: %s [--open] FILE\n", argv[0]);
        return 2;
    }
    if (rmm_validate(argv[1], print, &counts, NULL, &error) != RMM_OK) {
        fprintf(stderr, "%s: %s (%s)\n", argv[1], error.message, rmm_status_name(error.status));
        return 1;
    }
    return verdict(&counts);
}
