{{- define "qlora-operator.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "qlora-operator.fullname" -}}
{{- $name := include "qlora-operator.name" . -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name -}}
{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- /* Cluster-scoped objects carry the namespace, so that two installations of one name can stand side by side. */ -}}
{{- define "qlora-operator.clusterName" -}}
{{ printf "%s:%s" .Release.Namespace (include "qlora-operator.fullname" .) }}
{{- end }}

{{- define "qlora-operator.serviceAccountName" -}}
{{ .Values.serviceAccount.name | default (include "qlora-operator.fullname" .) }}
{{- end }}

{{- define "qlora-operator.reportService" -}}
{{ include "qlora-operator.fullname" . | trunc 55 | trimSuffix "-" }}-reports
{{- end }}

{{- define "qlora-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "qlora-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "qlora-operator.labels" -}}
{{ include "qlora-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- /* A reference to an image. Takes {image: {repository, tag, digest}, chart: .Chart}; the digest wins. */ -}}
{{- define "qlora-operator.image" -}}
{{- if .image.digest -}}
{{ printf "%s@%s" .image.repository .image.digest }}
{{- else -}}
{{ printf "%s:%s" .image.repository (.image.tag | default .chart.AppVersion) }}
{{- end -}}
{{- end }}

{{- /* Requests and limits with every quantity a string, as the operator reads them. JSON never writes 1e+06. */ -}}
{{- define "qlora-operator.quantities" -}}
{{- $result := dict -}}
{{- range $kind := list "requests" "limits" -}}
{{- $quantities := dict -}}
{{- range $resource, $quantity := (get $ $kind | default dict) -}}
{{- $_ := set $quantities $resource (toJson $quantity | trimAll "\"") -}}
{{- end -}}
{{- $_ := set $result $kind $quantities -}}
{{- end -}}
{{ toYaml $result }}
{{- end }}
