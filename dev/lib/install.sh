# Finding the installed servers, here or in $ROOT, and installing them where that is allowed. What is found is named as
# it is called within the root.

on_path() {
    [ -n "$ROOT" ] || command -v "$1" 2>/dev/null || true
}

# first_program PATTERN...: sets FOUND to the first of these that can be run.
first_program() {
    local candidate
    for candidate in "$@"; do
        if [ -n "$candidate" ] && [ -x "$candidate" ]; then
            FOUND=${candidate#"$ROOT"}
            return 0
        fi
    done
    return 1
}

# The server script itself: Debian's wrapper in /usr/sbin changes the user and forgets the environment.
find_rabbitmq() {
    first_program "$ROOT"/usr/lib/rabbitmq/bin/rabbitmq-server /opt/homebrew/opt/rabbitmq/sbin/rabbitmq-server \
        /usr/local/opt/rabbitmq/sbin/rabbitmq-server /opt/rabbitmq/sbin/rabbitmq-server "$(on_path rabbitmq-server)" \
        && RABBITMQ_SERVER=$FOUND
}

find_epmd() {
    first_program "$(on_path epmd)" "$ROOT"/usr/bin/epmd "$ROOT"/usr/lib/erlang/erts-*/bin/epmd \
        /opt/homebrew/opt/erlang/lib/erlang/erts-*/bin/epmd /usr/local/opt/erlang/lib/erlang/erts-*/bin/epmd \
        && EPMD=$FOUND
}

find_postgres() {
    local candidate
    # The last match wins: the newest of several installed versions.
    POSTGRES_BIN=""
    for candidate in "$(dirname "$(on_path initdb)")" "$ROOT"/usr/lib/postgresql/?/bin \
        "$ROOT"/usr/lib/postgresql/??/bin "$ROOT"/usr/pgsql-*/bin \
        /opt/homebrew/opt/postgresql@*/bin /usr/local/opt/postgresql@*/bin; do
        if [ -x "$candidate/initdb" ] && [ -x "$candidate/pg_ctl" ]; then
            POSTGRES_BIN=${candidate#"$ROOT"}
        fi
    done
    [ -n "$POSTGRES_BIN" ]
}

binaries_are_installed() {
    find_rabbitmq && find_epmd && find_postgres
}

missing_packages() {
    { find_rabbitmq && find_epmd; } || printf 'rabbitmq-server '
    find_postgres || printf 'postgresql '
}

ensure_installed() {
    local missing
    binaries_are_installed && return 0
    missing=$(missing_packages)
    if command -v apt-get > /dev/null 2>&1; then
        if [ "$(id -u)" != 0 ] || [ "${POSTROOM_DEV_INSTALL:-yes}" = no ]; then
            refuse "not installed: $missing
Neither containers nor these servers are available. Run
    sudo sh -c 'apt-get update && apt-get install -y --no-install-recommends $missing'
or name servers of yours in POSTROOM_TEST_AMQP_URL and POSTROOM_TEST_DATABASE_URL."
        fi
        # shellcheck disable=SC2086 # a list of packages
        apt_install $missing
    elif command -v brew > /dev/null 2>&1; then
        refuse "not installed: $missing
Run
    brew install rabbitmq postgresql@17
or name servers of yours in POSTROOM_TEST_AMQP_URL and POSTROOM_TEST_DATABASE_URL."
    else
        refuse "not installed: $missing
Install RabbitMQ 3.10 or later and Postgres 15 or later with your package manager,
or name servers of yours in POSTROOM_TEST_AMQP_URL and POSTROOM_TEST_DATABASE_URL."
    fi
    binaries_are_installed || die "installed, but still not found: $(missing_packages)"
}

# Installs without starting services: policy-rc.d with 101 forbids it, and is put back as it was (invoke-rc.d(8)).
apt_install() {
    local policy=/usr/sbin/policy-rc.d log="$DIR/install.log"
    say "installing $* (log: $log) ..."
    (
        restore() {
            rm -f "$policy"
            if [ -e "$policy.postroom" ] || [ -L "$policy.postroom" ]; then
                mv -f "$policy.postroom" "$policy"
            fi
        }
        if [ -e "$policy" ] || [ -L "$policy" ]; then
            mv -f "$policy" "$policy.postroom"
        fi
        trap restore EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM
        printf '#!/bin/sh\nexit 101\n' > "$policy"
        chmod 755 "$policy"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q && apt-get install -y -q --no-install-recommends "$@"
    ) > "$log" 2>&1 < /dev/null || {
        tail -n 20 "$log" >&2
        refuse "installing did not work; run
    apt-get update && apt-get install -y --no-install-recommends $*"
    }
}
