"""Small libraries for LD_PRELOAD that make a file system misbehave, at an exact call and in one process only."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
import time
from pathlib import Path

# The process forgets the shim as it starts, before Python reads its environment: what it starts is not shimmed.
_HEAD = r"""
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
static char below[4096], trace[4096], only[4096];
static long times, every;
/* A process that forks may set these two in its children. */
long shim_at, shim_calls;
static double delay;
__attribute__((constructor)) static void start(void) {
    const char *value;
    if ((value = getenv("SHIM_BELOW"))) strncpy(below, value, sizeof below - 1);
    if ((value = getenv("SHIM_ONLY"))) strncpy(only, value, sizeof only - 1);
    if ((value = getenv("SHIM_TRACE"))) strncpy(trace, value, sizeof trace - 1);
    shim_at = (value = getenv("SHIM_AT")) ? atol(value) : 0;
    times = (value = getenv("SHIM_TIMES")) ? atol(value) : 1;
    every = (value = getenv("SHIM_EVERY")) ? atol(value) : 0;
    delay = (value = getenv("SHIM_DELAY")) ? atof(value) : 0;
    unsetenv("LD_PRELOAD");
}
/* Below the folder and, unless SHIM_ONLY is empty, with one of its words (separated by |) at the path's end. */
static int is_below(const char *path) {
    char words[4096], *rest = words, *word;
    if (!*below || !path || strncmp(path, below, strlen(below))) return 0;
    if (!*only) return 1;
    strcpy(words, only);
    while ((word = strsep(&rest, "|")))
        if (strlen(word) <= strlen(path) && !strcmp(path + strlen(path) - strlen(word), word)) return 1;
    return 0;
}
static const char *path_of(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, 4095);
    buffer[length > 0 ? length : 0] = 0;
    return buffer;
}
#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
static void note(const char *what, const char *path) {
    if (!*trace) return;
    __typeof__(open) *real_open = (__typeof__(open) *)dlsym(RTLD_NEXT, "open");
    char line[8192];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", shim_calls, what, path);
    int fd = real_open(trace, O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (write(fd, line, length) < 0) abort();
    close(fd);
}
"""

# Counts calls that make something durable or visible to others; the process is killed before call number SHIM_AT.
_KILL = (
    _HEAD
    + r"""
static void count(const char *what, const char *path) {
    if (!is_below(path)) return;
    shim_calls++;
    note(what, path);
    if (shim_calls == shim_at) kill(getpid(), SIGKILL);
}
int fsync(int fd) { char b[4096]; REAL(fsync); count("fsync", path_of(fd, b)); return real(fd); }
int rename(const char *a, const char *b) { REAL(rename); count("rename", b); return real(a, b); }
int link(const char *a, const char *b) { REAL(link); count("link", b); return real(a, b); }
int linkat(int c, const char *a, int d, const char *b, int f) { REAL(linkat); count("link", b); return real(c, a, d, b, f); }
int symlink(const char *a, const char *b) { REAL(symlink); count("symlink", b); return real(a, b); }
int unlink(const char *a) { REAL(unlink); count("unlink", a); return real(a); }
int mkdir(const char *a, mode_t m) { REAL(mkdir); count("mkdir", a); return real(a, m); }
int rmdir(const char *a) { REAL(rmdir); count("rmdir", a); return real(a); }
"""
)

# Of open, opendir, readdir, read, rename and link below a folder, SHIM_TIMES calls from number SHIM_AT on, and every
# SHIM_EVERY-th, fail with ESTALE.
_STALE = (
    _HEAD
    + r"""
static int is_stale(const char *what, const char *path) {
    if (!is_below(path)) return 0;
    shim_calls++;
    note(what, path);
    return (shim_at && shim_calls >= shim_at && shim_calls < shim_at + times) || (every && shim_calls % every == 0);
}
/* The server has served these two; only the answer is lost. */
int rename(const char *a, const char *b) {
    REAL(rename); int status = real(a, b); if (is_stale("rename", b)) { errno = ESTALE; return -1; } return status; }
int link(const char *a, const char *b) {
    REAL(link); int status = real(a, b); if (is_stale("link", b)) { errno = ESTALE; return -1; } return status; }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        if (is_stale("open", path)) { errno = ESTALE; return -1; } \
        return real(path, flags, mode); }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        if (is_stale("open", path)) { errno = ESTALE; return -1; } \
        return real(folder, path, flags, mode); }
OPENAT(openat)
OPENAT(openat64)
DIR *opendir(const char *path) {
    REAL(opendir); if (is_stale("opendir", path)) { errno = ESTALE; return NULL; } return real(path); }
struct dirent64 *readdir64(DIR *stream) {
    char b[4096]; REAL(readdir64);
    if (is_stale("readdir", path_of(dirfd(stream), b))) { errno = ESTALE; return NULL; } return real(stream); }
ssize_t read(int fd, void *to, size_t size) {
    char b[4096]; REAL(read); if (is_stale("read", path_of(fd, b))) { errno = ESTALE; return -1; }
    return real(fd, to, size); }
"""
)

# Results below a folder are neither listed nor found until they are SHIM_DELAY seconds old, as with cached attributes.
_LATE = (
    _HEAD
    + r"""
static int is_late(const char *path) {
    const char *name = strrchr(path, '/');
    struct stat about;
    struct timespec now;
    if (!is_below(path) || !strstr(name ? name : path, ".result.json") || strstr(path, "/.tmp-")) return 0;
    if (fstatat(AT_FDCWD, path, &about, 0)) return 0;
    clock_gettime(CLOCK_REALTIME, &now);
    if (now.tv_sec + now.tv_nsec * 1e-9 - about.st_ctim.tv_sec - about.st_ctim.tv_nsec * 1e-9 >= delay) return 0;
    note("late", path);
    return 1;
}
struct dirent64 *readdir64(DIR *stream) {
    REAL(readdir64);
    char folder[4096], path[8192];
    struct dirent64 *entry;
    path_of(dirfd(stream), folder);
    while ((entry = real(stream))) {
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        if (!is_late(path)) break;
    }
    return entry;
}
int stat(const char *path, struct stat *to) {
    if (is_late(path)) { errno = ENOENT; return -1; } return fstatat(AT_FDCWD, path, to, 0); }
int stat64(const char *path, struct stat64 *to) {
    if (is_late(path)) { errno = ENOENT; return -1; } return fstatat64(AT_FDCWD, path, to, 0); }
int open64(const char *path, int flags, ...) {
    REAL(open64); va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more);
    if (is_late(path)) { errno = ENOENT; return -1; } return real(path, flags, mode); }
"""
)

# The time of day is CLOCK_BASE + CLOCK_AHEAD + CLOCK_RATE times what has passed since CLOCK_BASE, in this process and in
# all that it starts. (libfaketime's sleep fails where the monotonic clock is left alone.)
_CLOCK = r"""
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static double value(const char *name) { const char *text = getenv(name); return text ? atof(text) : 0; }
int clock_gettime(clockid_t id, struct timespec *to) {
    int status = syscall(SYS_clock_gettime, id, to);
    if (status || (id != CLOCK_REALTIME && id != CLOCK_REALTIME_COARSE)) return status;
    double base = value("CLOCK_BASE");
    double now = base + value("CLOCK_AHEAD") + value("CLOCK_RATE") * (to->tv_sec + to->tv_nsec * 1e-9 - base);
    to->tv_sec = now;
    to->tv_nsec = (now - to->tv_sec) * 1e9;
    return 0;
}
int gettimeofday(struct timeval *to, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    to->tv_sec = now.tv_sec;
    to->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to) *to = now.tv_sec;
    return now.tv_sec;
}
"""


@functools.cache
def _compiled(source: str) -> str:
    folder = Path(tempfile.mkdtemp(prefix="hpcft-shim-"))
    (folder / "shim.c").write_text(source)
    argv = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", folder / "shim.so", folder / "shim.c", "-ldl"]
    subprocess.run(argv, check=True)
    return str(folder / "shim.so")


def killed_at(call: int, below: Path, only: str = "", trace: Path | None = None) -> dict[str, str]:
    """The environment of a process that dies before a durable call below a folder, or on paths that end in `only`."""
    return _environment(_KILL, below, trace, SHIM_AT=call, SHIM_ONLY=only)


def stale(
    below: Path, call: int = 0, times: int = 1, every: int = 0, only: str = "", trace: Path | None = None
) -> dict[str, str]:
    """The environment of a process for which such calls below a folder meet a stale handle."""
    return _environment(
        _STALE, below, trace, SHIM_AT=call, SHIM_TIMES=times, SHIM_EVERY=every, SHIM_ONLY=only
    )


def late_by(delay_s: float, below: Path, trace: Path | None = None) -> dict[str, str]:
    """The environment of a process that sees results below a folder only so long after they are written."""
    return _environment(_LATE, below, trace, SHIM_DELAY=delay_s)


def with_clock(ahead_s: float = 0, rate: float = 1, beside: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a process and its children, on a host with this clock; the monotonic one is as ever."""
    given = beside or dict(os.environ)
    preloaded = [*filter(None, [given.get("LD_PRELOAD")]), _compiled(_CLOCK)]
    settings = {"CLOCK_BASE": time.time(), "CLOCK_AHEAD": ahead_s, "CLOCK_RATE": rate}
    return {
        **given,
        "LD_PRELOAD": ":".join(preloaded),
        **{name: str(value) for name, value in settings.items()},
    }


def _environment(source: str, below: Path, trace: Path | None, **settings: float | str) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "LD_PRELOAD": _compiled(source),
        "SHIM_BELOW": str(below),
        **({"SHIM_TRACE": str(trace)} if trace else {}),
        **{name: str(value) for name, value in settings.items()},
    }
