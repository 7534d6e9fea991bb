# Messages go to standard error: standard output is for `eval`.

say() {
    printf '%s\n' "$*" >&2
}

# Something did not work.
die() {
    say "dev/servers: $*"
    exit 1
}

# Something the caller has to do first.
refuse() {
    say "dev/servers: $*"
    exit 2
}

# What the servers of $DIR said last.
show_logs() {
    local log
    for log in "$DIR"/*.log "$DIR"/rabbitmq/log/*.log "$POSTGRES_DIR".log; do
        [ -s "$log" ] || continue
        say "--- $log"
        tail -n 20 "$log" >&2
    done
}

# within SECONDS COMMAND...: polls until COMMAND succeeds.
within() {
    local tries=$(($1 * 5))
    shift
    until "$@"; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || return 1
        sleep 0.2
    done
}

# limited SECONDS COMMAND...: COMMAND, ended after SECONDS (timeout(1) is missing on macOS).
limited() {
    local seconds=$1 job
    shift
    "$@" &
    job=$!
    if ! within "$seconds" gone "$job"; then
        kill "$job" 2>/dev/null || true
        wait "$job" 2>/dev/null || true
        return 1
    fi
    wait "$job"
}

gone() {
    ! kill -0 "$1" 2>/dev/null
}
