# Free ports and processes, with nothing but bash, kill and ps.

# Whether something accepts connections on this port of the loopback interface.
port_answers() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# A port below the range from which systems take ports for outgoing connections.
free_port() {
    local port
    while :; do
        port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
        case " $taken_ports " in *" $port "*) continue ;; esac
        if ! port_answers "$port"; then
            taken_ports="$taken_ports $port"
            chosen_port=$port
            return
        fi
    done
}

choose_ports() {
    taken_ports=""
    free_port; AMQP_PORT=$chosen_port
    free_port; MANAGEMENT_PORT=$chosen_port
    free_port; DIST_PORT=$chosen_port
    free_port; EPMD_PORT=$chosen_port
    free_port; POSTGRES_PORT=$chosen_port
}

# ps(1) is missing in small images, /proc on macOS.
command_line() {
    if [ -r "/proc/$1/cmdline" ]; then
        tr '\0' ' ' < "/proc/$1/cmdline"
    else
        ps -ww -o command= -p "$1"
    fi 2> /dev/null
}

# process_is PID MARKER: whether PID runs and its command line holds MARKER. A stale pid file must not name a stranger.
process_is() {
    [ -n "$1" ] && kill -0 "$1" 2>/dev/null || return 1
    case "$(command_line "$1")" in
        *"$2"*) return 0 ;;
        *) return 1 ;;
    esac
}

# end_process PID SECONDS [SIGNAL]: asks first, insists after SECONDS.
end_process() {
    kill "-${3:-TERM}" "$1" 2>/dev/null || return 0
    within "$2" gone "$1" || kill -KILL "$1" 2>/dev/null || true
    within 5 gone "$1" || true
}

# First line of a file, or nothing.
read_pid() {
    if [ -f "$1" ]; then
        head -n 1 "$1"
    fi
}
