# Servers as containers of docker-compose.yml, under a project name of this folder's own.

compose() {
    POSTROOM_AMQP_PORT=$AMQP_PORT POSTROOM_MANAGEMENT_PORT=$MANAGEMENT_PORT POSTROOM_POSTGRES_PORT=$POSTGRES_PORT \
        docker compose --project-name "$TAG" --file "$top/docker-compose.yml" "$@" >> "$DIR/compose.log" 2>&1
}

images_are_here() {
    local image
    for image in $(sed -n 's/^ *image: *//p' "$top/docker-compose.yml"); do
        docker image inspect "$image" > /dev/null 2>&1 || return 1
    done
}

containers_are_possible() {
    command -v docker > /dev/null 2>&1 || return 1
    limited 10 docker info > /dev/null 2>&1 || return 1
    docker compose version > /dev/null 2>&1 || return 1
    images_are_here && return 0
    say "fetching container images (at most a minute) ..."
    limited 60 docker compose --file "$top/docker-compose.yml" pull --quiet > /dev/null 2>&1 && images_are_here
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
