{{/* Names */}}

{{- define "postroom.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* 40 characters at most: names of objects get a suffix, and must stay labels. */}}
{{- define "postroom.fullname" -}}
{{- $name := include "postroom.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "postroom.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "postroom.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "postroom.image" -}}
{{- $path := .Values.image.repository -}}
{{- if .Values.image.registry -}}{{- $path = printf "%s/%s" .Values.image.registry $path -}}{{- end -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $path .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" $path (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* A text on lines of its own, indented, or nothing if it is empty. Arguments: indent, text. */}}
{{- define "postroom.block" -}}
{{- $text := index . 1 | trim -}}
{{- if $text -}}{{- $text | nindent (index . 0 | int) -}}{{- end -}}
{{- end -}}

{{/* Labels and annotations. Arguments of the component ones: root, component. */}}

{{- define "postroom.selectorLabels" -}}
app.kubernetes.io/name: {{ include "postroom.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Also in a pod's labels: nothing here may change with the chart's version only, or every upgrade rolls all pods. */}}
{{- define "postroom.podLabels" -}}
{{ include "postroom.selectorLabels" . }}
app.kubernetes.io/part-of: postroom
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "postroom.labels" -}}
{{ include "postroom.podLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Arguments: root, and more annotations. */}}
{{- define "postroom.annotations" -}}
{{- with merge (dict) (default (dict) .more) .root.Values.commonAnnotations -}}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{/* Settings */}}

{{/* The settings of a component, its own before the shared ones, as JSON; null is none. Not with `merge`, for which false, 0 and an
     empty list are none too. Arguments: root, component. */}}
{{- define "postroom.settingsOf" -}}
{{- $merged := dict -}}
{{- range $settings := list .root.Values.settings (index .root.Values .component).settings -}}
{{- range $name, $value := $settings -}}
{{- if not (kindIs "invalid" $value) -}}{{- $_ := set $merged $name $value -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $merged -}}
{{- end -}}

{{/* Numbers come as floating point: 1e+07 is not what the binary reads. */}}
{{- define "postroom.text" -}}
{{- if kindIs "slice" . -}}{{- join "," . -}}
{{- else if kindIs "float64" . -}}
{{- if eq . (floor .) -}}{{- printf "%.0f" . -}}{{- else -}}{{- toString . -}}{{- end -}}
{{- else -}}{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* As variables; those of OpenTelemetry have its names. Argument: the settings. */}}
{{- define "postroom.settings" -}}
{{- range $name, $value := . }}
{{- $variable := snakecase $name | upper }}
- name: {{ hasPrefix "OTEL_" $variable | ternary "" "POSTROOM_" }}{{ $variable }}
  value: {{ include "postroom.text" $value | quote }}
{{- end }}
{{- end -}}

{{/* A duration such as 1h30m in seconds, rounded up. */}}
{{- define "postroom.seconds" -}}
{{- $millis := 0 -}}
{{- $factors := dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 "d" 86400000 -}}
{{- range regexFindAll "[0-9]+(ms|s|m|h|d)" . -1 -}}
{{- $unit := regexFind "[a-z]+" . -}}
{{- $millis = add $millis (mul (regexFind "[0-9]+" . | int64) (index $factors $unit)) -}}
{{- end -}}
{{- div (add $millis 999) 1000 -}}
{{- end -}}

{{/* Seconds from SIGTERM to SIGKILL: the time the process gives itself, and some to spare. Arguments: root, component. */}}
{{- define "postroom.terminationGracePeriod" -}}
{{- $settings := include "postroom.settingsOf" . | fromJson -}}
{{- $grace := include "postroom.seconds" (default "60s" $settings.gracePeriod) | int -}}
{{- max (index .root.Values .component).terminationGracePeriodSeconds (add $grace 30) -}}
{{- end -}}

{{/* Most pods of a component. Arguments: root, component. */}}
{{- define "postroom.maxPods" -}}
{{- $it := index .root.Values .component -}}
{{- if not $it.enabled -}}0
{{- else if eq $it.autoscaling.type "none" -}}{{- $it.replicas -}}
{{- else -}}{{- $it.autoscaling.maxReplicas -}}
{{- end -}}
{{- end -}}

{{/* Most connections to Postgres of one pod: a worker's heartbeats have one of their own. Arguments: root, component. */}}
{{- define "postroom.connections" -}}
{{- $settings := include "postroom.settingsOf" . | fromJson -}}
{{- add (default 8 $settings.databasePoolSize | int) (ternary 1 0 (eq .component "worker")) -}}
{{- end -}}

{{- define "postroom.prefix" -}}
{{- $settings := include "postroom.settingsOf" . | fromJson -}}
{{- default "mail" $settings.prefix -}}
{{- end -}}

{{/* Secrets and certificate authorities */}}

{{- define "postroom.rabbitmqSecret" -}}
{{- required "rabbitmq.secret is required: the name of a secret with the broker's URL, or with its username, password, host and port (see rabbitmq.urlKey)" .Values.rabbitmq.secret -}}
{{- end -}}

{{- define "postroom.postgresSecret" -}}
{{- required "postgres.secret is required: the name of a secret with the database's URL (see postgres.urlKey)" .Values.postgres.secret -}}
{{- end -}}

{{- define "postroom.keysSecret" -}}
{{- required "keys.secret is required: the name of a secret with what `postroom key generate` prints (see keys.encryptionKey)" .Values.keys.secret -}}
{{- end -}}

{{/* The broker's URL: as a file, or put together from what the operator's secret has. Arguments: root, secret. */}}
{{- define "postroom.rabbitmqEnv" -}}
{{- $it := .root.Values.rabbitmq -}}
{{- if $it.urlKey }}
- name: POSTROOM_AMQP_URL_FILE
  value: /etc/postroom/rabbitmq/url
{{- else }}
{{- range $variable, $key := dict "RABBITMQ_USERNAME" $it.usernameKey "RABBITMQ_PASSWORD" $it.passwordKey "RABBITMQ_HOST" $it.hostKey "RABBITMQ_PORT" $it.portKey }}
- name: {{ $variable }}
  valueFrom:
    secretKeyRef:
      name: {{ $.secret }}
      key: {{ $key }}
{{- end }}
- name: POSTROOM_AMQP_URL
  value: {{ printf "%s://$(RABBITMQ_USERNAME):$(RABBITMQ_PASSWORD)@$(RABBITMQ_HOST):$(RABBITMQ_PORT)/%s" (ternary "amqps" "amqp" $it.tls) ($it.vhost | urlquery | replace "+" "%20") | quote }}
{{- end }}
{{- if or $it.ca.secret $it.ca.configMap }}
{{- if not (or $it.urlKey $it.tls) }}
{{- fail "rabbitmq.ca needs rabbitmq.tls: the URL put together begins with amqp, which sends the password in clear" }}
{{- end }}
- name: POSTROOM_AMQP_CA_FILE
  value: /etc/postroom/rabbitmq-ca/ca.crt
{{- end }}
{{- end -}}

{{- define "postroom.postgresEnv" -}}
- name: POSTROOM_DATABASE_URL_FILE
  value: /etc/postroom/postgres/url
{{- if or .Values.postgres.ca.secret .Values.postgres.ca.configMap }}
- name: POSTROOM_DATABASE_CA_FILE
  value: /etc/postroom/postgres-ca/ca.crt
{{- end }}
{{- end -}}

{{/* Arguments: name, secret, items as a map of path to key. */}}
{{- define "postroom.secretVolume" -}}
- name: {{ .name }}
  secret:
    secretName: {{ .secret }}
    items:
      {{- range $path, $key := .items }}
      - key: {{ $key }}
        path: {{ $path }}
      {{- end }}
{{- end -}}

{{/* Arguments: name, ca. */}}
{{- define "postroom.caVolume" -}}
{{- if .ca.secret }}
{{ include "postroom.secretVolume" (dict "name" .name "secret" .ca.secret "items" (dict "ca.crt" .ca.key)) }}
{{- else if .ca.configMap }}
- name: {{ .name }}
  configMap:
    name: {{ .ca.configMap }}
    items:
      - key: {{ .ca.key }}
        path: ca.crt
{{- end }}
{{- end -}}

{{- define "postroom.mount" -}}
- name: {{ . }}
  mountPath: /etc/postroom/{{ . }}
  readOnly: true
{{- end -}}

{{/* Volumes of the two servers. Arguments: root, and the secrets postgres, postgresKey, rabbitmq; either may be missing. */}}
{{- define "postroom.serverVolumes" -}}
{{- if .postgres }}
{{ include "postroom.secretVolume" (dict "name" "postgres" "secret" .postgres "items" (dict "url" .postgresKey)) }}
{{- include "postroom.caVolume" (dict "name" "postgres-ca" "ca" .root.Values.postgres.ca) }}
{{- end }}
{{- if .rabbitmq }}
{{- if .root.Values.rabbitmq.urlKey }}
{{ include "postroom.secretVolume" (dict "name" "rabbitmq" "secret" .rabbitmq "items" (dict "url" .root.Values.rabbitmq.urlKey)) }}
{{- end }}
{{- include "postroom.caVolume" (dict "name" "rabbitmq-ca" "ca" .root.Values.rabbitmq.ca) }}
{{- end }}
{{- end -}}

{{- define "postroom.postgresMounts" -}}
{{ include "postroom.mount" "postgres" }}
{{- if or .Values.postgres.ca.secret .Values.postgres.ca.configMap }}
{{ include "postroom.mount" "postgres-ca" }}
{{- end }}
{{- end -}}

{{- define "postroom.rabbitmqMounts" -}}
{{- if .Values.rabbitmq.urlKey }}
{{ include "postroom.mount" "rabbitmq" }}
{{- end }}
{{- if or .Values.rabbitmq.ca.secret .Values.rabbitmq.ca.configMap }}
{{ include "postroom.mount" "rabbitmq-ca" }}
{{- end }}
{{- end -}}

{{/* What every pod begins with. Service links would put POSTROOM_… variables of their own into it. */}}
{{- define "postroom.podSpec" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- end -}}

{{/* What every container begins with. Arguments: root, name, args. */}}
{{- define "postroom.container" -}}
- name: {{ .name }}
  image: {{ include "postroom.image" .root | quote }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  args: {{ toJson .args }}
  securityContext:
    {{- toYaml .root.Values.securityContext | nindent 4 }}
{{- end -}}
