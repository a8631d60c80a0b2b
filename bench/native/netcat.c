/* What `nc` does, where it is not installed: bytes between a TCP connection and a standard stream.
 *
 *     netcat listen PORT      accept one connection, copy what comes to standard output
 *     netcat HOST PORT        connect, copy standard input
 *
 * Reads and writes of 128 KiB, as `cat` does. HOST is an IPv4 address.
 */

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char buffer[128 * 1024];

static int fail(const char *what) {
    perror(what);
    return 1;
}

static int copy(int from, int to) {
    ssize_t got;
    while ((got = read(from, buffer, sizeof buffer)) > 0)
        for (ssize_t done = 0, put; done < got; done += put)
            if ((put = write(to, buffer + done, got - done)) < 0) return fail("write");
    return got < 0 ? fail("read") : 0;
}

int main(int argc, char **argv) {
    if (argc != 3) return fprintf(stderr, "usage: see the head of netcat.c\n"), 2;
    int on = 1, made = socket(AF_INET, SOCK_STREAM, 0), listens = !strcmp(argv[1], "listen");
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    if (!listens) {
        if (inet_pton(AF_INET, argv[1], &address.sin_addr) != 1)
            return fprintf(stderr, "netcat: %s is no IPv4 address\n", argv[1]), 2;
        if (connect(made, (void *)&address, sizeof address)) return fail("connect");
        return copy(STDIN_FILENO, made);
    }
    setsockopt(made, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(made, (void *)&address, sizeof address) || listen(made, 1)) return fail("listen");
    int connection = accept(made, NULL, NULL);
    return connection < 0 ? fail("accept") : copy(connection, STDOUT_FILENO);
}
