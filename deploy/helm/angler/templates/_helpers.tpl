{{- define "angler.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "angler.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "angler.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "angler.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "angler.selector" -}}
app.kubernetes.io/name: {{ include "angler.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "angler.labels" -}}
{{ include "angler.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "angler.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "angler.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* angler.toml. A value's JSON is its TOML too, for the kinds that settings have: strings, numbers, booleans, lists. */ -}}
{{- define "angler.settings" -}}
{{- range $section, $keys := .Values.settings }}
[{{ $section }}]
{{- range $key, $value := $keys }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{ end }}
{{- end -}}

{{- /* The drain has shutdown.grace_seconds; SIGKILL must come after it. */ -}}
{{- define "angler.terminationSeconds" -}}
{{- range concat .Values.extraEnv -}}
{{- if hasPrefix "ANGLER__SHUTDOWN__" .name -}}
{{- fail (printf "extraEnv: %s would win over settings.shutdown, from which the grace period is computed; set settings.shutdown.grace_seconds" .name) -}}
{{- end -}}
{{- end -}}
{{- add (.Values.settings.shutdown.grace_seconds | int) (.Values.terminationMarginSeconds | int) -}}
{{- end -}}

{{- /* The ports that workers connect to, as a JSON list: those of networkPolicy and the one of the collector of traces. */ -}}
{{- define "angler.egressPorts" -}}
{{- $ports := list -}}
{{- range .Values.networkPolicy.egressPorts -}}{{- $ports = append $ports (int .) -}}{{- end -}}
{{- $telemetry := .Values.settings.telemetry | default dict -}}
{{- with $telemetry.otlp_endpoint -}}
{{- $url := urlParse . -}}
{{- $port := ternary 443 80 (eq $url.scheme "https") -}}
{{- $ports = append $ports (regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default $port | int) -}}
{{- end -}}
{{- toJson (uniq $ports) -}}
{{- end -}}

{{- /* The queues whose jobs need workers, as a JSON list. amqp.jobs_queue may be several, with weights: "a:8,b:1". */ -}}
{{- define "angler.queues" -}}
{{- if .Values.keda.queues -}}
{{- toJson .Values.keda.queues -}}
{{- else -}}
{{- $jobs := default "angler.jobs" (.Values.settings.amqp | default dict).jobs_queue -}}
{{- if kindIs "slice" $jobs -}}{{- $jobs = join "," $jobs -}}{{- end -}}
{{- $queues := list -}}
{{- range splitList "," $jobs -}}
{{- $name := regexReplaceAll ":[0-9]+$" (trim .) "" -}}
{{- $queues = append $queues $name -}}
{{- $queues = append $queues (printf "%s.suspects" (trimSuffix ".jobs" $name)) -}}
{{- end -}}
{{- toJson (uniq $queues) -}}
{{- end -}}
{{- end -}}
