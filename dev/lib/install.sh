# Finding the installed servers, and installing them where that is allowed.

# The server script itself: Debian's wrapper in /usr/sbin changes the user and forgets the environment.
find_rabbitmq() {
    local candidate
    for candidate in /usr/lib/rabbitmq/bin/rabbitmq-server /opt/homebrew/opt/rabbitmq/sbin/rabbitmq-server \
        /usr/local/opt/rabbitmq/sbin/rabbitmq-server /opt/rabbitmq/sbin/rabbitmq-server \
        "$(command -v rabbitmq-server 2>/dev/null || true)"; do
        if [ -x "$candidate" ]; then
            RABBITMQ_SERVER=$candidate
            return 0
        fi
    done
    return 1
}

find_epmd() {
    local candidate
    for candidate in "$(command -v epmd 2>/dev/null || true)" /usr/lib/erlang/bin/epmd /usr/lib/erlang/erts-*/bin/epmd \
        /opt/homebrew/opt/erlang/lib/erlang/erts-*/bin/epmd /usr/local/opt/erlang/lib/erlang/erts-*/bin/epmd; do
        if [ -x "$candidate" ]; then
            EPMD=$candidate
            return 0
        fi
    done
    return 1
}

find_postgres() {
    local candidate
    # The last match wins: the newest of several installed versions.
    POSTGRES_BIN=""
    for candidate in "$(dirname "$(command -v initdb 2>/dev/null || echo /nowhere/initdb)")" \
        /usr/lib/postgresql/?/bin /usr/lib/postgresql/??/bin /usr/pgsql-*/bin \
        /opt/homebrew/opt/postgresql@*/bin /usr/local/opt/postgresql@*/bin; do
        if [ -x "$candidate/initdb" ] && [ -x "$candidate/pg_ctl" ]; then
            POSTGRES_BIN=$candidate
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
