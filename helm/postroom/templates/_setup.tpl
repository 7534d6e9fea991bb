{{/* The secrets that setup works with. */}}

{{- define "postroom.setupPostgresSecret" -}}
{{- .Values.setup.postgres.secret | default (include "postroom.postgresSecret" .) -}}
{{- end -}}

{{- define "postroom.setupPostgresKey" -}}
{{- ternary .Values.setup.postgres.urlKey .Values.postgres.urlKey (ne .Values.setup.postgres.secret "") -}}
{{- end -}}

{{- define "postroom.setupRabbitmqSecret" -}}
{{- .Values.setup.rabbitmq.secret | default (include "postroom.rabbitmqSecret" .) -}}
{{- end -}}

{{/* Some settings as variables: those of workers, which setup is for. Arguments: root, names. */}}
{{- define "postroom.setupSettings" -}}
{{- $settings := include "postroom.settingsOf" (dict "root" .root "component" "worker") | fromJson -}}
{{- $some := dict -}}
{{- range .names -}}
{{- if hasKey $settings . -}}{{- $_ := set $some . (index $settings .) -}}{{- end -}}
{{- end -}}
{{- include "postroom.settings" $some -}}
{{- end -}}

{{/* `postroom migrate`. Arguments: root, postgresVolume. */}}
{{- define "postroom.migrateContainer" -}}
{{- $args := list "migrate" -}}
{{- with .root.Values.setup.grantTo -}}{{- $args = concat $args (list "--grant" .) -}}{{- end -}}
{{ include "postroom.container" (dict "root" .root "name" "migrate" "args" $args) }}
  env:
    {{- include "postroom.postgresEnv" .root | nindent 4 }}
    {{- include "postroom.block" (list 4 (include "postroom.setupSettings" (dict "root" .root "names" (list "databaseSchema" "log" "logFormat")))) }}
  resources:
    {{- toYaml .root.Values.setup.resources | nindent 4 }}
  volumeMounts:
    - name: {{ .postgresVolume }}
      mountPath: /etc/postroom/postgres
      readOnly: true
    {{- if or .root.Values.postgres.ca.secret .root.Values.postgres.ca.configMap }}
    {{- include "postroom.mount" "postgres-ca" | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* `postroom topology apply`. Arguments: root, rabbitmqVolume. */}}
{{- define "postroom.topologyContainer" -}}
{{ include "postroom.container" (dict "root" .root "name" "topology" "args" (list "topology" "apply")) }}
  env:
    {{- include "postroom.block" (list 4 (include "postroom.rabbitmqEnv" (dict "root" .root "secret" (include "postroom.setupRabbitmqSecret" .root)))) }}
    {{- include "postroom.block" (list 4 (include "postroom.setupSettings" (dict "root" .root "names" (list "prefix" "queues" "log" "logFormat")))) }}
  resources:
    {{- toYaml .root.Values.setup.resources | nindent 4 }}
  {{- $url := .root.Values.rabbitmq.urlKey }}
  {{- $ca := or .root.Values.rabbitmq.ca.secret .root.Values.rabbitmq.ca.configMap }}
  {{- if or $url $ca }}
  volumeMounts:
    {{- if $url }}
    - name: {{ .rabbitmqVolume }}
      mountPath: /etc/postroom/rabbitmq
      readOnly: true
    {{- end }}
    {{- if $ca }}
    {{- include "postroom.mount" "rabbitmq-ca" | nindent 4 }}
    {{- end }}
  {{- end }}
{{- end -}}
