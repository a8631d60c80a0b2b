/* A stand-in for llama-server that costs next to nothing: what a proxy in front of it adds shows.
 *
 * It takes llama-server's command line (as far as meshd uses it) and answers the paths meshd asks.
 * A chat is answered at once with a fixed JSON body; with "stream":true in the request's body it is
 * a stream of "n_events":K events at "rate_hz":R (0: as fast as they go), one HTTP chunk each. An
 * event's content begins with @<CLOCK_MONOTONIC, ns>#<sequence number>, so the client knows how
 * long it travelled, and whether one is missing. It survives a proxy that rewrites events.
 *
 * Besides --host X.sock it listens on TCP 127.0.0.1:$MOCK_TCP_PORT if that is set.
 * One thread, epoll; a timerfd, because epoll's own timeouts are whole milliseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
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
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX_REQUEST (1 << 20)
#define MAX_CONNECTIONS 8192
#define EVENT_BYTES 200 /* of `data: {...}\n\n`, about what llama-server sends a token */
#define SECOND_NS 1000000000ull

struct conn {
    int fd;
    char *in;
    size_t in_len, in_cap;
    char *out; /* what the socket did not take */
    size_t out_len, out_cap;
    bool streaming, broken;
    unsigned next_event, n_events;
    uint64_t due_ns, period_ns;
    size_t heap_at;
};

static int epoll_fd, timer_fd;
static struct conn *heap[MAX_CONNECTIONS]; /* streams, the one due first on top */
static size_t heap_len, open_connections;
static unsigned streams_begun;
static char model[256] = "mock", aliases_json[1024] = "[\"mock\"]";
static unsigned slots = 4, context = 4096;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND_NS + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    fprintf(stderr, "mock_engine: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* -- streams by the time of their next event -------------------------------------------------- */

static void heap_put(size_t at, struct conn *c) {
    heap[at] = c;
    c->heap_at = at;
}

static void heap_settle(struct conn *c) {
    size_t at = c->heap_at;
    while (at > 0 && heap[(at - 1) / 2]->due_ns > c->due_ns) {
        heap_put(at, heap[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    for (;;) {
        size_t child = 2 * at + 1;
        if (child + 1 < heap_len && heap[child + 1]->due_ns < heap[child]->due_ns) child++;
        if (child >= heap_len || heap[child]->due_ns >= c->due_ns) break;
        heap_put(at, heap[child]);
        at = child;
    }
    heap_put(at, c);
}

static void heap_add(struct conn *c) {
    heap_put(heap_len++, c);
    heap_settle(c);
}

static void heap_remove(struct conn *c) {
    struct conn *last = heap[--heap_len];
    if (last == c) return;
    heap_put(c->heap_at, last);
    heap_settle(last);
}

/* -- output ----------------------------------------------------------------------------------- */

static void watch(struct conn *c, uint32_t events) {
    struct epoll_event e = {.events = events, .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
}

static void put(struct conn *c, const char *data, size_t len) {
    if (c->broken) return;
    if (c->out_len == 0) {
        ssize_t n = send(c->fd, data, len, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) {
            c->broken = true;
            return;
        }
        if (n > 0) data += n, len -= (size_t)n;
        if (len == 0) return;
        watch(c, EPOLLIN | EPOLLOUT);
    }
    if (c->out_len + len > c->out_cap) {
        c->out_cap = 2 * (c->out_len + len);
        c->out = realloc(c->out, c->out_cap);
        if (c->out == NULL) die("realloc");
    }
    memcpy(c->out + c->out_len, data, len);
    c->out_len += len;
}

static void flush(struct conn *c) {
    ssize_t n = send(c->fd, c->out, c->out_len, MSG_NOSIGNAL);
    if (n < 0) {
        c->broken = errno != EAGAIN;
        return;
    }
    memmove(c->out, c->out + n, c->out_len - (size_t)n);
    c->out_len -= (size_t)n;
    if (c->out_len == 0) watch(c, EPOLLIN);
}

static void answer(struct conn *c, const char *status, const char *body, size_t len) {
    char head[256];
    int n = snprintf(head, sizeof head,
                     "HTTP/1.1 %s\r\nServer: llama.cpp\r\nContent-Type: application/json; "
                     "charset=utf-8\r\nContent-Length: %zu\r\n\r\n",
                     status, len);
    char *whole = malloc((size_t)n + len);
    if (whole == NULL) die("malloc");
    memcpy(whole, head, (size_t)n);
    memcpy(whole + n, body, len);
    put(c, whole, (size_t)n + len);
    free(whole);
}

static void answer_text(struct conn *c, const char *body) {
    answer(c, "200 OK", body, strlen(body));
}

static void send_event(struct conn *c) {
    char data[EVENT_BYTES + 1], chunk[EVENT_BYTES + 32];
    static const char tail[] = "\"},\"finish_reason\":null}]}\n\n";
    int n = snprintf(data, sizeof data,
                     "data: {\"id\":\"chatcmpl-0\",\"object\":\"chat.completion.chunk\",\"created\":1,"
                     "\"model\":\"mock\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"@%llu#%u ",
                     (unsigned long long)now_ns(), c->next_event);
    size_t pad_end = EVENT_BYTES - (sizeof tail - 1);
    for (size_t i = (size_t)n; i < pad_end; i++) data[i] = 'x';
    memcpy(data + ((size_t)n > pad_end ? (size_t)n : pad_end), tail, sizeof tail - 1);
    n = snprintf(chunk, sizeof chunk, "%x\r\n%.*s\r\n", EVENT_BYTES, EVENT_BYTES, data);
    put(c, chunk, (size_t)n);
}

static void advance_stream(struct conn *c) {
    static const char end[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    if (c->next_event < c->n_events) {
        send_event(c);
        c->next_event++;
        c->due_ns += c->period_ns;
        heap_settle(c);
        return;
    }
    put(c, end, sizeof end - 1);
    c->streaming = false;
    heap_remove(c);
}

/* -- requests --------------------------------------------------------------------------------- */

/* The number after "key": in a JSON text, or `otherwise`. */
static double number(const char *body, const char *key, double otherwise) {
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\"", key);
    const char *at = strstr(body, quoted);
    if (at == NULL) return otherwise;
    at += strlen(quoted);
    at += strspn(at, " :");
    return strtod(at, NULL);
}

static bool asks_for_stream(const char *body) {
    const char *at = strstr(body, "\"stream\"");
    if (at == NULL) return false;
    at += 8;
    at += strspn(at, " :");
    return strncmp(at, "true", 4) == 0;
}

static void begin_stream(struct conn *c, const char *body) {
    static const char head[] =
        "HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\n"
        "Transfer-Encoding: chunked\r\n\r\n";
    double rate_hz = number(body, "rate_hz", 0);
    c->n_events = (unsigned)number(body, "n_events", 16);
    c->next_event = 0;
    c->period_ns = rate_hz > 0 ? (uint64_t)(1e9 / rate_hz) : 0;
    c->streaming = true;
    c->due_ns = now_ns();
    put(c, head, sizeof head - 1);
    heap_add(c);
    advance_stream(c); /* the first one at once: the time to it is the proxy's */
    /* The rest of the streams' events fall evenly over the period, not in one burst. */
    c->due_ns += (uint64_t)(streams_begun++ * 0.6180339887 * (double)c->period_ns) %
                 (c->period_ns ? c->period_ns : 1);
    if (c->streaming) heap_settle(c);
}

static void answer_slots(struct conn *c) {
    size_t cap = 64 * (size_t)slots + 16, n = 1;
    char *body = malloc(cap);
    if (body == NULL) die("malloc");
    body[0] = '[';
    for (unsigned i = 0; i < slots; i++)
        n += (size_t)snprintf(body + n, cap - n, "%s{\"id\":%u,\"n_ctx\":%u,\"is_processing\":false}",
                              i ? "," : "", i, context / slots);
    body[n++] = ']';
    answer(c, "200 OK", body, n);
    free(body);
}

static void respond(struct conn *c, const char *method, const char *path, const char *body) {
    static const char chat[] =
        "{\"choices\":[{\"finish_reason\":\"stop\",\"index\":0,\"message\":{\"role\":\"assistant\","
        "\"content\":\"A fixed answer of a length that a short reply of a model has: some words, a "
        "sentence, and a little more to come near to four hundred bytes in all.\"}}],\"created\":1,"
        "\"model\":\"mock\",\"system_fingerprint\":\"b1-0c1e570\",\"object\":\"chat.completion\","
        "\"usage\":{\"completion_tokens\":32,\"prompt_tokens\":23,\"total_tokens\":55},"
        "\"id\":\"chatcmpl-0\"}";
    char text[2048];
    if (strcmp(method, "POST") == 0 && strcmp(path, "/v1/chat/completions") == 0) {
        if (asks_for_stream(body))
            begin_stream(c, body);
        else
            answer(c, "200 OK", chat, sizeof chat - 1);
    } else if (strcmp(method, "POST") == 0 && strcmp(path, "/completion") == 0) {
        answer_text(c, "{\"index\":0,\"content\":\"a\",\"tokens\":[],\"id_slot\":0,\"stop\":true,"
                       "\"model\":\"mock\",\"tokens_predicted\":1,\"tokens_evaluated\":1}");
    } else if (strcmp(path, "/health") == 0) {
        answer_text(c, "{\"status\":\"ok\"}");
    } else if (strcmp(path, "/slots") == 0) {
        answer_slots(c);
    } else if (strcmp(path, "/props") == 0) {
        snprintf(text, sizeof text,
                 "{\"default_generation_settings\":{\"n_ctx\":%u},\"total_slots\":%u,"
                 "\"model_alias\":\"%s\",\"model_path\":\"\"}",
                 context / slots, slots, model);
        answer_text(c, text);
    } else if (strcmp(path, "/v1/models") == 0) {
        snprintf(text, sizeof text,
                 "{\"object\":\"list\",\"data\":[{\"id\":\"%s\",\"aliases\":%s,\"object\":\"model\","
                 "\"created\":1,\"owned_by\":\"llamacpp\"}]}",
                 model, aliases_json);
        answer_text(c, text);
    } else {
        static const char unknown[] = "{\"error\":{\"message\":\"File Not Found\",\"type\":"
                                      "\"not_found_error\",\"code\":404}}";
        answer(c, "404 Not Found", unknown, sizeof unknown - 1);
    }
}

/* Takes one request off the input; false if it is not all there. */
static bool take_request(struct conn *c) {
    if (c->streaming || c->in_len == 0) return false;
    c->in[c->in_len] = 0;
    char *end = strstr(c->in, "\r\n\r\n");
    if (end == NULL) return false;
    size_t head_len = (size_t)(end - c->in) + 4;
    end[2] = 0;
    const char *length = strcasestr(c->in, "\r\ncontent-length:");
    size_t body_len = length ? strtoul(length + 17, NULL, 10) : 0;
    bool closes = strcasestr(c->in, "\r\nconnection: close") != NULL;
    end[2] = '\r';
    if (head_len + body_len > MAX_REQUEST) {
        c->broken = true;
        return false;
    }
    if (c->in_len < head_len + body_len) return false;
    char method[8], path[256];
    if (sscanf(c->in, "%7s %255s", method, path) != 2) {
        c->broken = true;
        return false;
    }
    char kept = c->in[head_len + body_len];
    c->in[head_len + body_len] = 0;
    respond(c, method, path, c->in + head_len);
    c->in[head_len + body_len] = kept;
    c->in_len -= head_len + body_len;
    memmove(c->in, c->in + head_len + body_len, c->in_len);
    if (closes && !c->streaming) shutdown(c->fd, SHUT_WR);
    return true;
}

static void receive(struct conn *c) {
    if (c->in_cap - c->in_len < 8192) {
        if (c->in_cap > 2 * MAX_REQUEST) {
            c->broken = true;
            return;
        }
        c->in_cap = c->in_cap ? 2 * c->in_cap : 16384;
        c->in = realloc(c->in, c->in_cap);
        if (c->in == NULL) die("realloc");
    }
    ssize_t n = recv(c->fd, c->in + c->in_len, c->in_cap - c->in_len - 1, 0);
    if (n <= 0) {
        c->broken = n == 0 || errno != EAGAIN;
        return;
    }
    c->in_len += (size_t)n;
    while (take_request(c)) {
    }
}

/* -- connections ------------------------------------------------------------------------------ */

static void accept_all(int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), on = 1;
        if (fd < 0) return;
        struct conn *c = open_connections < MAX_CONNECTIONS ? calloc(1, sizeof *c) : NULL;
        if (c == NULL) {
            close(fd);
            continue;
        }
        open_connections++;
        c->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* no effect on a unix socket */
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
    }
}

static void drop(struct conn *c) {
    if (c->streaming) heap_remove(c);
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
    open_connections--;
}

static int listen_on(struct sockaddr *address, socklen_t len) {
    int fd = socket(address->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    if (fd < 0) die("socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, address, len) < 0) die("bind");
    if (listen(fd, 4096) < 0) die("listen");
    struct epoll_event e = {.events = EPOLLIN, .data.u64 = ((uint64_t)fd << 1) | 1};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e); /* odd: pointers are not */
    return fd;
}

static void arm_timer(void) {
    static uint64_t armed_ns;
    uint64_t due_ns = heap_len ? heap[0]->due_ns : 0;
    if (due_ns == armed_ns && due_ns > now_ns()) return;
    armed_ns = due_ns;
    struct itimerspec t = {{0, 0}, {(time_t)(due_ns / SECOND_NS), (long)(due_ns % SECOND_NS)}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &t, NULL);
}

static void send_due(void) {
    uint64_t now = now_ns();
    /* At most one event a stream and turn, so that a fast one does not starve the rest. */
    for (size_t turn = heap_len; turn > 0 && heap_len && heap[0]->due_ns <= now; turn--) {
        struct conn *c = heap[0];
        if (c->broken || c->out_len > 65536) { /* dropped when epoll tells, or held back */
            c->due_ns = now + SECOND_NS / 1000;
            heap_settle(c);
        } else {
            advance_stream(c);
            if (!c->streaming)
                while (take_request(c)) {
                }
        }
    }
}

static void serve(void) {
    struct epoll_event events[256];
    for (;;) {
        arm_timer();
        int n = epoll_wait(epoll_fd, events, 256, -1);
        for (int i = 0; i < n; i++) {
            if (events[i].data.u64 & 1) {
                accept_all((int)(events[i].data.u64 >> 1));
                continue;
            }
            struct conn *c = events[i].data.ptr;
            if (c == NULL) { /* the timer */
                uint64_t times;
                if (read(timer_fd, &times, sizeof times) < 0 && errno != EAGAIN) die("timerfd");
                continue;
            }
            if (events[i].events & EPOLLOUT) flush(c);
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(c);
            if (c->broken) drop(c);
        }
        send_due();
    }
}

/* -- command line ----------------------------------------------------------------------------- */

static void set_aliases(const char *list) {
    size_t n = 0;
    char copy[512];
    snprintf(copy, sizeof copy, "%s", list);
    for (char *save, *name = strtok_r(copy, ",", &save); name; name = strtok_r(NULL, ",", &save)) {
        if (n == 0) snprintf(model, sizeof model, "%s", name);
        n += (size_t)snprintf(aliases_json + n, sizeof aliases_json - n, "%s\"%s\"", n ? "," : "[", name);
    }
    snprintf(aliases_json + n, sizeof aliases_json - n, "]");
}

static void print_help(void) {
    puts("-h, --help\n--version\n--list-devices\n-m, --model FNAME\n-a, --alias STRING\n"
         "--host HOST    ip address to listen, or bind to an UNIX socket if the address ends with .sock\n"
         "--port PORT\n-c, --ctx-size N\n-np, --parallel N\n-t, --threads N\n"
         "-ngl, --gpu-layers, --n-gpu-layers N\n-ctk, --cache-type-k TYPE\n-ctv, --cache-type-v TYPE\n"
         "--no-webui\n--slots, --no-slots\n--offline\n-mm, --mmproj FILE\n-lv, --verbosity N\n-cram, --cache-ram N\n"
         "(a mock for benchmarks: it makes no text)");
}

int main(int argc, char **argv) {
    const char *host = NULL, *port = getenv("MOCK_TCP_PORT");
    for (int i = 1; i < argc; i++) {
        const char *flag = argv[i];
        if (strcmp(flag, "--version") == 0) {
            fprintf(stderr, "version: 0.5.0-dev (build 1, commit 0c1e570)\nbuilt with cc for Linux\n");
            return 0;
        }
        if (strcmp(flag, "--list-devices") == 0) return puts("Available devices:\n  (none)") < 0;
        if (strcmp(flag, "--help") == 0) return print_help(), 0;
        if (strcmp(flag, "--no-webui") == 0 || strcmp(flag, "--slots") == 0 ||
            strcmp(flag, "--offline") == 0)
            continue;
        const char *value = ++i < argc ? argv[i] : "";
        if (strcmp(flag, "--host") == 0) host = value;
        if (strcmp(flag, "--alias") == 0) set_aliases(value);
        if (strcmp(flag, "--parallel") == 0) slots = (unsigned)atoi(value);
        if (strcmp(flag, "--ctx-size") == 0) context = (unsigned)atoi(value);
    }
    if (slots == 0) slots = 1;
    if (port != NULL) prctl(PR_SET_PDEATHSIG, SIGTERM); /* started by the benchmark itself */
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (epoll_fd < 0 || timer_fd < 0) die("epoll");
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &e);
    if (host != NULL) {
        struct sockaddr_un a = {.sun_family = AF_UNIX};
        snprintf(a.sun_path, sizeof a.sun_path, "%s", host);
        unlink(host);
        listen_on((struct sockaddr *)&a, sizeof a);
    }
    if (port != NULL) {
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        listen_on((struct sockaddr *)&a, sizeof a);
    }
    fprintf(stderr, "main: server is listening\n");
    serve();
}
