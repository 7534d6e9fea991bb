# Servers as containers of docker-compose.yml, under a project name of this folder's own. Only RabbitMQ and Postgres: the
# rest of that file is for people.

compose() {
    POSTROOM_AMQP_PORT=$AMQP_PORT POSTROOM_MANAGEMENT_PORT=$MANAGEMENT_PORT POSTROOM_POSTGRES_PORT=$POSTGRES_PORT \
        docker compose --project-name "$TAG" --file "$top/docker-compose.yml" "$@" >> "$DIR/compose.log" 2>&1
}

# Images of the two services, in the order of the file.
server_images() {
    sed -n '/^  rabbitmq:$/,/^  [a-z]/s/^    image: *//p; /^  postgres:$/,/^  [a-z]/s/^    image: *//p' "$top/docker-compose.yml"
}

images_are_here() {
    local image
    for image in $(server_images); do
        docker image inspect "$image" > /dev/null 2>&1 || return 1
    done
}

containers_are_possible() {
    command -v docker > /dev/null 2>&1 || return 1
    limited 10 docker info > /dev/null 2>&1 || return 1
    docker compose version > /dev/null 2>&1 || return 1
    images_are_here && return 0
    say "fetching container images (at most a minute) ..."
    limited 60 docker compose --file "$top/docker-compose.yml" pull --quiet rabbitmq postgres > /dev/null 2>&1 && images_are_here
}

# Whether somebody ran `docker compose up` here; sets the ports. Tests and demo take vhosts and databases of their own there.
users_containers_are_up() {
    local service
    command -v docker > /dev/null 2>&1 && limited 10 docker compose version > /dev/null 2>&1 || return 1
    for service in rabbitmq postgres; do
        [ -n "$(docker compose --file "$top/docker-compose.yml" ps --status running --quiet "$service" 2>/dev/null)" ] || return 1
    done
    AMQP_PORT=$(users_port rabbitmq 5672) && MANAGEMENT_PORT=$(users_port rabbitmq 15672) \
        && POSTGRES_PORT=$(users_port postgres 5432) \
        && port_answers "$AMQP_PORT" && port_answers "$MANAGEMENT_PORT" && port_answers "$POSTGRES_PORT"
}

# 127.0.0.1:5672 -> 5672
users_port() {
    local address
    address=$(docker compose --file "$top/docker-compose.yml" port "$1" "$2" 2>/dev/null) && printf %s "${address##*:}"
}

start_containers() {
    say "starting RabbitMQ and Postgres in containers ..."
    compose up --detach --wait --wait-timeout 90 rabbitmq postgres
}

containers_are_up() {
    port_answers "$AMQP_PORT" && port_answers "$MANAGEMENT_PORT" && port_answers "$POSTGRES_PORT" \
        && [ -n "$(docker compose --project-name "$TAG" ps --quiet 2>/dev/null)" ]
}

stop_containers() {
    compose down --volumes --remove-orphans --timeout 5 || true
}

container_action() {
    case "$1" in
        halt) compose stop "$2" ;;
        kill) compose kill "$2" ;;
        start) compose up --detach --wait --wait-timeout 90 "$2" ;;
    esac
}
