/* The client of the benchmarks: one thread, epoll, keep-alive. Prints one JSON object and ends.
 *
 *   load requests --port P --body JSON --connections C --count N --warmup W --max-s S
 *   load streams  --port P --body JSON --connections C --events K --max-s S
 *
 * requests: every connection sends its next request when the answer to its last one is complete,
 *   until N answers are there after the first W (which are not counted), or S seconds are over.
 *   C = 1 measures latency, more measure throughput.
 * streams: every connection sends one request, PACE_NS apart, and reads K events. An event carries
 *   @<CLOCK_MONOTONIC, ns>#<sequence number> (see mock_engine.c): its delay is the time of the read
 *   that completed it less that stamp. Merged: further events completed by one and the same read.
 *
 * It always stops by itself: by count, by time, or after MAX_ERRORS.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SECOND_NS 1000000000ull
#define PACE_NS 2000000ull
#define MAX_ERRORS 1000
#define MAX_CONNECTIONS 4096
#define MAX_SAMPLES (8u << 20)

enum part { HEAD, LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, DONE };

struct samples {
    uint64_t *ns;
    size_t len, cap;
};

struct conn {
    int fd;
    enum part part;
    char head[8192];
    size_t head_len;
    uint64_t left; /* of the body or the chunk */
    bool closes, busy;
    unsigned line_len; /* of the trailer's present line */
    uint64_t sent_ns;
    /* the event being read */
    unsigned events, completed_by_read;
    bool first_seen, after_newline;
    int field; /* 0: seek '@', 1: the stamp, 2: the sequence number, 3: both are there */
    uint64_t stamp_ns, sequence;
};

static struct samples latency, delay, ttft;
static struct conn *conns;
static int epoll_fd, port;
static char *request;
static size_t request_len;
static bool streams;
static unsigned long n_connections = 1, count = 1, warmup, n_events;
static unsigned long answered, errors, reconnects, finished, disordered, merged, lost, events_seen;
static int bad_status;
static double max_s = 10;
static uint64_t began_ns;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND_NS + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void add(struct samples *s, uint64_t ns) {
    if (s->len >= MAX_SAMPLES) return;
    if (s->len == s->cap) {
        s->cap = s->cap ? 2 * s->cap : 65536;
        s->ns = realloc(s->ns, s->cap * sizeof *s->ns);
        if (s->ns == NULL) die("realloc");
    }
    s->ns[s->len++] = ns;
}

/* -- connections ------------------------------------------------------------------------------ */

static void open_connection(struct conn *c) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int on = 1;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("socket");
    if (connect(c->fd, (struct sockaddr *)&a, sizeof a) < 0) die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &e);
}

static void close_connection(struct conn *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    c->busy = false;
}

static void send_request(struct conn *c) {
    c->part = HEAD;
    c->head_len = 0;
    c->closes = false;
    c->busy = true;
    c->sent_ns = now_ns();
    if (send(c->fd, request, request_len, MSG_NOSIGNAL) != (ssize_t)request_len) errors++;
}

/* -- answers ---------------------------------------------------------------------------------- */

static void event_complete(struct conn *c, uint64_t read_ns) {
    if (!c->first_seen) add(&ttft, read_ns - c->sent_ns);
    c->first_seen = true;
    add(&delay, read_ns - c->stamp_ns);
    if (c->sequence != c->events) disordered++;
    c->events++;
    c->completed_by_read++;
    events_seen++;
}

static void scan_events(struct conn *c, const char *data, size_t len, uint64_t read_ns) {
    for (size_t i = 0; i < len; i++) {
        char ch = data[i];
        if (ch == '\n') {
            if (c->after_newline && c->field == 3) event_complete(c, read_ns);
            if (c->after_newline) c->field = 0;
            c->after_newline = true;
            continue;
        }
        if (ch != '\r') c->after_newline = false;
        if (c->field == 0 && ch == '@') {
            c->field = 1;
            c->stamp_ns = c->sequence = 0;
        } else if (c->field == 1) {
            if (ch == '#') c->field = 2;
            else c->stamp_ns = c->stamp_ns * 10 + (uint64_t)(ch - '0');
        } else if (c->field == 2) {
            if (ch < '0' || ch > '9') c->field = 3;
            else c->sequence = c->sequence * 10 + (uint64_t)(ch - '0');
        }
    }
}

static void read_head(struct conn *c) {
    c->head[c->head_len] = 0;
    int status = atoi(c->head + 9);
    if (status != 200) {
        errors++;
        bad_status = status;
    }
    c->closes = strcasestr(c->head, "\r\nconnection: close") != NULL;
    const char *length = strcasestr(c->head, "\r\ncontent-length:");
    if (strcasestr(c->head, "\r\ntransfer-encoding: chunked") != NULL) {
        c->part = CHUNK_SIZE;
        c->left = 0;
    } else {
        c->left = length ? strtoull(length + 17, NULL, 10) : 0;
        c->part = c->left ? LENGTH : DONE;
    }
}

static void parse(struct conn *c, const char *data, size_t len, uint64_t read_ns) {
    size_t i = 0;
    while (i < len && c->part != DONE) {
        size_t n = len - i < c->left ? len - i : (size_t)c->left;
        switch (c->part) {
        case HEAD:
            c->head[c->head_len++] = data[i++];
            if (c->head_len >= 4 && memcmp(c->head + c->head_len - 4, "\r\n\r\n", 4) == 0) read_head(c);
            else if (c->head_len == sizeof c->head - 1) errors++, c->part = DONE;
            break;
        case LENGTH:
        case CHUNK_DATA:
            if (streams) scan_events(c, data + i, n, read_ns);
            i += n;
            c->left -= n;
            if (c->left == 0) c->part = c->part == LENGTH ? DONE : CHUNK_END;
            break;
        case CHUNK_SIZE: {
            char ch = data[i++];
            if (ch == '\n') {
                c->line_len = 0;
                c->part = c->left ? CHUNK_DATA : TRAILER;
            } else if (ch != '\r') {
                c->left = c->left * 16 + (uint64_t)(ch <= '9' ? ch - '0' : (ch | 32) - 'a' + 10);
            }
            break;
        }
        case CHUNK_END:
            if (data[i++] == '\n') c->part = CHUNK_SIZE, c->left = 0;
            break;
        case TRAILER:
            if (data[i] == '\n') {
                if (c->line_len == 0) c->part = DONE;
                c->line_len = 0;
            } else if (data[i] != '\r') {
                c->line_len++;
            }
            i++;
            break;
        case DONE:
            break;
        }
    }
}

static void answer_complete(struct conn *c, uint64_t read_ns) {
    c->busy = false;
    if (streams) {
        finished++;
        lost += c->events < n_events ? n_events - c->events : 0;
        return;
    }
    answered++;
    if (answered > warmup) add(&latency, read_ns - c->sent_ns);
    if (answered == warmup) began_ns = read_ns;
    if (answered >= warmup + count) return;
    if (c->closes) {
        close_connection(c);
        reconnects++;
        open_connection(c);
    }
    send_request(c);
}

static void receive(struct conn *c) {
    static char buffer[65536];
    ssize_t n = recv(c->fd, buffer, sizeof buffer, MSG_DONTWAIT);
    uint64_t read_ns = now_ns();
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        bool was_busy = c->busy;
        close_connection(c);
        if (was_busy) {
            errors++;
            if (streams) finished++, lost += n_events - c->events;
        }
        if (!streams && errors < MAX_ERRORS) {
            reconnects++;
            open_connection(c);
            send_request(c);
        }
        return;
    }
    c->completed_by_read = 0;
    parse(c, buffer, (size_t)n, read_ns);
    if (c->completed_by_read > 1) merged += c->completed_by_read - 1;
    if (c->busy && c->part == DONE) answer_complete(c, read_ns);
}

static bool over(void) {
    return errors >= MAX_ERRORS || (streams ? finished >= n_connections : answered >= warmup + count);
}

static void run(void) {
    struct epoll_event events[256];
    uint64_t end_ns = now_ns() + (uint64_t)(max_s * 1e9), next_start_ns = now_ns();
    unsigned long started = 0;
    for (unsigned long i = 0; i < n_connections; i++) open_connection(&conns[i]);
    began_ns = now_ns();
    while (!over() && now_ns() < end_ns) {
        if (started < n_connections && now_ns() >= next_start_ns) {
            send_request(&conns[started++]);
            next_start_ns += streams ? PACE_NS : 0;
        }
        int n = epoll_wait(epoll_fd, events, 256, started < n_connections ? !!streams : 100);
        for (int i = 0; i < n && !over(); i++) receive(events[i].data.ptr);
    }
    for (unsigned long i = 0; streams && i < n_connections; i++)
        if (conns[i].busy) lost += n_events - conns[i].events; /* cut by the time limit */
}

/* -- report ----------------------------------------------------------------------------------- */

static int compare(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void print_samples(const char *name, struct samples *s) {
    static const double parts[] = {0.5, 0.9, 0.99};
    static const char *names[] = {"p50", "p90", "p99"};
    if (s->len) qsort(s->ns, s->len, sizeof *s->ns, compare);
    printf(",\"%s\":{\"n\":%zu", name, s->len);
    for (int i = 0; i < 3 && s->len; i++)
        printf(",\"%s\":%.2f", names[i], (double)s->ns[(size_t)(parts[i] * (double)(s->len - 1))] / 1e3);
    if (s->len) printf(",\"max\":%.2f", (double)s->ns[s->len - 1] / 1e3);
    printf("}");
}

static void print_report(void) {
    double elapsed_s = (double)(now_ns() - began_ns) / 1e9;
    printf("{\"errors\":%lu,\"bad_status\":%d,\"elapsed_s\":%.6f", errors, bad_status, elapsed_s);
    if (streams) {
        printf(",\"streams\":%lu,\"finished\":%lu,\"events\":%lu,\"lost\":%lu,\"merged\":%lu,"
               "\"disordered\":%lu",
               n_connections, finished, events_seen, lost, merged, disordered);
        print_samples("delay_us", &delay);
        print_samples("ttft_us", &ttft);
    } else {
        unsigned long timed = answered > warmup ? answered - warmup : 0;
        printf(",\"answered\":%lu,\"timed\":%lu,\"reconnects\":%lu,\"per_s\":%.2f", answered, timed,
               reconnects, (double)timed / elapsed_s);
        print_samples("latency_us", &latency);
    }
    printf("}\n");
}

int main(int argc, char **argv) {
    const char *body = "{}", *path = "/v1/chat/completions";
    if (argc < 2) return fprintf(stderr, "usage: see the head of load.c\n"), 2;
    streams = strcmp(argv[1], "streams") == 0;
    for (int i = 2; i + 1 < argc; i += 2) {
        const char *flag = argv[i], *value = argv[i + 1];
        if (strcmp(flag, "--port") == 0) port = atoi(value);
        else if (strcmp(flag, "--body") == 0) body = value;
        else if (strcmp(flag, "--path") == 0) path = value;
        else if (strcmp(flag, "--connections") == 0) n_connections = strtoul(value, NULL, 10);
        else if (strcmp(flag, "--count") == 0) count = strtoul(value, NULL, 10);
        else if (strcmp(flag, "--warmup") == 0) warmup = strtoul(value, NULL, 10);
        else if (strcmp(flag, "--events") == 0) n_events = strtoul(value, NULL, 10);
        else if (strcmp(flag, "--max-s") == 0) max_s = atof(value);
        else return fprintf(stderr, "load: unknown flag %s\n", flag), 2;
    }
    if (n_connections < 1 || n_connections > MAX_CONNECTIONS)
        return fprintf(stderr, "load: 1 to %d connections\n", MAX_CONNECTIONS), 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int n = asprintf(&request,
                     "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUser-Agent: load\r\nAccept: */*\r\n"
                     "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                     path, port, strlen(body), body);
    if (n < 0) die("asprintf");
    request_len = (size_t)n;
    conns = calloc(n_connections, sizeof *conns);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (conns == NULL || epoll_fd < 0) die("set-up");
    run();
    print_report();
    return 0;
}
