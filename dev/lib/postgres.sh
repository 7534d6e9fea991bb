# A private Postgres cluster. It refuses to run as root, so root runs it as the package's user.

# As uid:gid, because the root folder has users of its own.
postgres_user() {
    local user=nobody
    if [ -n "$ROOT" ]; then
        sed -n 's/^postgres:[^:]*:\([0-9]*:[0-9]*\):.*/\1/p' "$ROOT/etc/passwd"
        return
    fi
    ! id -u postgres > /dev/null 2>&1 || user=postgres
    printf '%s:%s\n' "$(id -u "$user")" "$(id -g "$user")"
}

as_postgres() {
    local user
    if [ "$(id -u)" != 0 ]; then
        "$@"
        return
    fi
    user=$(postgres_user)
    if [ -n "$ROOT" ]; then
        (in_root setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups -- "$@")
    elif command -v setpriv > /dev/null 2>&1; then
        setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups -- "$@"
    elif command -v runuser > /dev/null 2>&1; then
        runuser -u "$(id -nu "${user%:*}")" -- "$@"
    else
        su "$(id -nu "${user%:*}")" -s /bin/sh -c "$(printf '%q ' "$@")"
    fi
}

postgres_pid() {
    local pid
    pid=$(read_pid "$POSTGRES_DIR/postmaster.pid")
    if process_is "$pid" "$POSTGRES_DIR"; then
        echo "$pid"
    fi
}

postgres_is_up() {
    [ -n "$(postgres_pid)" ] && port_answers "$POSTGRES_PORT"
}

# Below the project's folder if its owner-to-be can get there (a clone in /root is closed to it), else below /tmp.
make_postgres_dir() {
    mkdir -p "$POSTGRES_DIR"
    if [ "$(id -u)" = 0 ]; then
        chmod 755 "$DIR"
        chown "$(postgres_user)" "$POSTGRES_DIR"
        if ! as_postgres test -x "$POSTGRES_DIR" 2>/dev/null; then
            rmdir "$POSTGRES_DIR"
            POSTGRES_DIR=$(mktemp -d "${TMPDIR:-/tmp}/postroom-postgres.XXXXXX")
            chown "$(postgres_user)" "$POSTGRES_DIR"
            save_state
        fi
    fi
    chmod 700 "$POSTGRES_DIR"
}

start_postgres() {
    postgres_is_up && return 0
    binaries_are_installed || die "Postgres is not installed"
    say "starting a private Postgres on port $POSTGRES_PORT ..."
    make_postgres_dir
    (
        for name in $(env | sed -n 's/^\(PG[A-Z0-9_]*\)=.*/\1/p'); do unset "$name"; done
        cd "$POSTGRES_DIR"
        if [ ! -f PG_VERSION ]; then
            as_postgres "$POSTGRES_BIN/initdb" -D "$POSTGRES_DIR" -U postgres -A trust -E UTF8 --locale=C --no-sync
        fi
        # No Unix socket: its path may be longer than the system allows.
        as_postgres "$POSTGRES_BIN/pg_ctl" -D "$POSTGRES_DIR" -w -t 60 -l "$POSTGRES_DIR/server.log" -o "-p $POSTGRES_PORT \
-c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c max_connections=300 -c shared_buffers=128MB" start
    ) > "$DIR/postgres.log" 2>&1 < /dev/null && within 30 postgres_is_up
}

stop_postgres() {
    local pid
    pid=$(postgres_pid)
    # SIGINT is the fast shutdown: clients are disconnected.
    [ -z "$pid" ] || end_process "$pid" 20 INT
}

# SIGQUIT, the immediate shutdown: recovery at the next start, as after a crash. SIGKILL would leave its children behind.
kill_postgres() {
    local pid
    pid=$(postgres_pid)
    [ -z "$pid" ] || end_process "$pid" 10 QUIT
}
