"""Turns a built template into one that MiniStack takes: what differs from what is deployed, and nothing else, is here.

- Supabase on one machine has no TLS; a deployed stack is refused without.
- MiniStack has no alarms on sums of metrics.
- It hands a number that comes from a parameter on as text.
"""
import json
import sys

from samcli.yamlhelper import yaml_dump, yaml_parse

source, target = sys.argv[1:]
with open(source) as file:
    template = yaml_parse(file.read())
parameters, resources = template["Parameters"], template["Resources"]

for name in ("SupabaseUrl", "PublicOrigin"):
    parameters[name]["AllowedPattern"] = "^https?://[^/]+$"

sums = [name for name, resource in resources.items() if "Metrics" in resource["Properties"] and resource["Type"].endswith("::Alarm")]
for name in sums:
    del resources[name]
dashboard = resources["Dashboard"]["Properties"]["DashboardBody"]
body = json.loads(dashboard["Fn::Sub"])
shown = body["widgets"][0]["properties"]
shown["alarms"] = [alarm for alarm in shown["alarms"] if not any(alarm == "${%s.Arn}" % name for name in sums)]
dashboard["Fn::Sub"] = json.dumps(body)


def spell_out(value):
    if isinstance(value, dict):
        if set(value) == {"Ref"} and parameters.get(value["Ref"], {}).get("Type") == "Number":
            return int(parameters[value["Ref"]]["Default"])
        return {key: spell_out(inner) for key, inner in value.items()}
    return [spell_out(inner) for inner in value] if isinstance(value, list) else value


template["Resources"] = spell_out(resources)
with open(target, "w") as file:
    file.write(yaml_dump(template))
