# A private RabbitMQ node: own epmd, ports, cookie, configuration and data; loopback only.

rabbitmq_pid() {
    local pid
    pid=$(read_pid "$DIR/rabbitmq/pid")
    if process_is "$pid" "-postroom_servers $TAG"; then
        echo "$pid"
    fi
}

epmd_pid() {
    local pid
    pid=$(read_pid "$DIR/rabbitmq/epmd.pid")
    if process_is "$pid" "-port $EPMD_PORT"; then
        echo "$pid"
    fi
}

rabbitmq_is_up() {
    [ -n "$(rabbitmq_pid)" ] && port_answers "$AMQP_PORT" && port_answers "$MANAGEMENT_PORT"
}

# Stops waiting as soon as the server has given up.
rabbitmq_is_up_or_dead() {
    rabbitmq_is_up || gone "$1"
}

configure_rabbitmq() {
    local dir="$DIR/rabbitmq"
    mkdir -p "$dir/log" "$dir/conf.d"
    cat > "$dir/rabbitmq.conf" <<CONF
listeners.tcp.1 = 127.0.0.1:$AMQP_PORT
management.tcp.ip = 127.0.0.1
management.tcp.port = $MANAGEMENT_PORT
collect_statistics_interval = 1000
log.file.level = warning
disk_free_limit.absolute = 100MB
raft.wal_max_size_bytes = 67108864
CONF
    echo '[rabbitmq_management].' > "$dir/enabled_plugins"
    : > "$dir/rabbitmq-env.conf"
}

start_epmd() {
    [ -z "$(epmd_pid)" ] || return 0
    # A process group of its own: Ctrl-C is for whoever uses the servers. (Postgres sees to that itself.)
    set -m
    in_root nohup "$EPMD" -address 127.0.0.1 -port "$EPMD_PORT" > "$DIR/rabbitmq/epmd.log" 2>&1 < /dev/null &
    echo $! > "$DIR/rabbitmq/epmd.pid"
    set +m
    within 5 port_answers "$EPMD_PORT"
}

start_rabbitmq() {
    local dir="$DIR/rabbitmq" job
    rabbitmq_is_up && return 0
    binaries_are_installed || die "RabbitMQ is not installed"
    say "starting a private RabbitMQ on port $AMQP_PORT ..."
    configure_rabbitmq
    start_epmd || return 1
    rm -f "$dir/pid"
    set -m
    (
        # Settings of a system-wide RabbitMQ must not leak in.
        for name in $(env | sed -n 's/^\(RABBITMQ_[A-Z0-9_]*\)=.*/\1/p'); do unset "$name"; done
        export HOME="$dir"
        export ERL_EPMD_PORT="$EPMD_PORT" ERL_EPMD_ADDRESS=127.0.0.1
        export RABBITMQ_NODENAME="$TAG@localhost" RABBITMQ_DIST_PORT="$DIST_PORT"
        export RABBITMQ_CONF_ENV_FILE="$dir/rabbitmq-env.conf"
        export RABBITMQ_CONFIG_FILE="$dir/rabbitmq.conf" RABBITMQ_CONFIG_FILES="$dir/conf.d"
        export RABBITMQ_ADVANCED_CONFIG_FILE="$dir/advanced.config"
        export RABBITMQ_ENABLED_PLUGINS_FILE="$dir/enabled_plugins"
        export RABBITMQ_MNESIA_BASE="$dir/data" RABBITMQ_LOG_BASE="$dir/log" RABBITMQ_PID_FILE="$dir/pid"
        export RABBITMQ_SCHEMA_DIR="$dir/schema" RABBITMQ_GENERATED_CONFIG_DIR="$dir/config"
        export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1} -postroom_servers $TAG"
        cd "$dir"
        in_root nohup "$RABBITMQ_SERVER" > "$DIR/rabbitmq.log" 2>&1 < /dev/null
    ) &
    job=$!
    set +m
    within 90 rabbitmq_is_up_or_dead "$job" && rabbitmq_is_up
}

# The memory alarm, on with a share of memory that is always in use.
rabbitmq_watermark() {
    HOME="$DIR/rabbitmq" ERL_EPMD_PORT="$EPMD_PORT" RABBITMQ_NODENAME="$TAG@localhost" \
        RABBITMQ_CONF_ENV_FILE="$DIR/rabbitmq/rabbitmq-env.conf" \
        "$(dirname "$RABBITMQ_SERVER")/rabbitmqctl" --quiet set_vm_memory_high_watermark "$1" >&2
}

stop_rabbitmq() {
    local pid
    pid=$(rabbitmq_pid)
    [ -z "$pid" ] || end_process "$pid" 20
    stop_epmd
}

kill_rabbitmq() {
    local pid
    pid=$(rabbitmq_pid)
    [ -z "$pid" ] || end_process "$pid" 5 KILL
}

stop_epmd() {
    local pid
    pid=$(epmd_pid)
    [ -z "$pid" ] || end_process "$pid" 5
}
