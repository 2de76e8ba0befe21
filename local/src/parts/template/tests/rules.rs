//! What `template.yaml` promises an operator, rule by rule: linters know AWS's rules, and not these.

use serde_yaml_ng::Value as Yaml;
use std::{collections::BTreeMap, fs, path::Path};

fn file(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)).unwrap()
}

fn document() -> Yaml {
    serde_yaml_ng::from_str(&file("template.yaml")).unwrap()
}

/// A value without its tag, as `!Ref Name`.
fn plain(yaml: &Yaml) -> &Yaml {
    if let Yaml::Tagged(tagged) = yaml { &tagged.value } else { yaml }
}

fn at<'a>(yaml: &'a Yaml, path: &[&str]) -> &'a Yaml {
    path.iter().fold(yaml, |yaml, name| plain(yaml).get(*name).unwrap_or(&Yaml::Null))
}

fn text(yaml: &Yaml) -> String {
    match plain(yaml) {
        Yaml::String(text) => text.clone(),
        Yaml::Number(number) => number.to_string(),
        Yaml::Bool(flag) => flag.to_string(),
        _ => String::new(),
    }
}

/// Every text in a value.
fn texts(yaml: &Yaml, into: &mut Vec<String>) {
    match plain(yaml) {
        Yaml::Sequence(items) => items.iter().for_each(|item| texts(item, into)),
        Yaml::Mapping(mapping) => mapping.values().for_each(|value| texts(value, into)),
        other => into.push(text(other)),
    }
}

/// Resources of a type with their properties, by name.
fn resources(document: &Yaml, kind: &str) -> BTreeMap<String, Yaml> {
    let of_kind = |(name, resource): (&Yaml, &Yaml)| {
        (text(&resource["Type"]) == kind).then(|| (text(name), at(resource, &["Properties"]).clone()))
    };
    document["Resources"].as_mapping().unwrap().iter().filter_map(of_kind).collect()
}

#[test]
fn every_parameter_says_what_it_wants_and_what_can_have_a_default_has_one() {
    let document = document();
    let given = ["SupabaseUrl", "SupabasePublishableKey", "PublicOrigin", "SecretArn"];
    let groups = &document["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"];
    let mut shown = Vec::new();
    for group in groups.as_sequence().unwrap() {
        texts(&group["Parameters"], &mut shown);
    }
    let mut names = Vec::new();
    for (name, parameter) in document["Parameters"].as_mapping().unwrap() {
        let name = text(name);
        assert!(text(&parameter["Description"]).len() > 20, "{name} is not described");
        assert_eq!(parameter.get("Default").is_none(), given.contains(&name.as_str()), "{name}");
        // A secret would have NoEcho; there are none, only where they are kept.
        assert!(parameter.get("NoEcho").is_none(), "{name} is a secret");
        names.push(name);
    }
    shown.sort();
    names.sort();
    assert_eq!(shown, names, "every parameter is in a group");
}

#[test]
fn every_function_has_a_role_of_its_own_that_names_resources_and_logs_that_end() {
    let document = document();
    let (roles, logs) = (resources(&document, "AWS::IAM::Role"), resources(&document, "AWS::Logs::LogGroup"));
    let mut taken = Vec::new();
    for (name, function) in resources(&document, "AWS::Serverless::Function") {
        let role = text(&function["Role"]).trim_end_matches(".Arn").to_owned();
        assert!(roles.contains_key(&role) && !taken.contains(&role), "{name} has the role {role}");
        taken.push(role);
        let group = text(at(&function, &["LoggingConfig", "LogGroup"]));
        assert_eq!(text(&logs[&group]["RetentionInDays"]), "LogRetentionDays", "{name}");
        assert_eq!(text(at(&function, &["LoggingConfig", "LogFormat"])), "JSON", "{name}");
        // What a variable holds is readable to whoever may look at the function.
        let mut values = Vec::new();
        texts(at(&function, &["Environment", "Variables"]), &mut values);
        assert!(!values.iter().any(|value| value.contains("resolve:")), "{name} has a secret in its environment");
    }
    for (name, group) in &logs {
        assert_eq!(text(&group["RetentionInDays"]), "LogRetentionDays", "{name} is kept for ever");
    }
    for (name, role) in &roles {
        for policy in role["Policies"].as_sequence().unwrap() {
            for statement in at(policy, &["PolicyDocument", "Statement"]).as_sequence().unwrap() {
                let (mut actions, mut over) = (Vec::new(), Vec::new());
                texts(&statement["Action"], &mut actions);
                texts(&statement["Resource"], &mut over);
                assert!(!over.is_empty() && over.iter().all(|one| !one.is_empty() && one != "*"), "{name}: {over:?}");
                assert!(actions.iter().all(|action| !action.contains('*')), "{name}: {actions:?}");
            }
        }
        assert!(role.get("ManagedPolicyArns").is_none(), "{name} has rights that somebody else decides");
    }
}

#[test]
fn every_schedule_has_a_time_zone_a_bounded_retry_and_a_place_for_what_was_lost() {
    let document = document();
    let mut schedules = 0;
    for (name, function) in resources(&document, "AWS::Serverless::Function") {
        for (id, event) in function["Events"].as_mapping().unwrap() {
            let (id, properties) = (text(id), &event["Properties"]);
            match text(&event["Type"]).as_str() {
                "ScheduleV2" => {
                    schedules += 1;
                    assert_eq!(text(&properties["ScheduleExpressionTimezone"]), "UTC", "{name} {id}");
                    assert!(text(at(properties, &["RetryPolicy", "MaximumEventAgeInSeconds"])).parse::<u32>().is_ok());
                    assert_eq!(
                        text(at(properties, &["DeadLetterConfig", "Arn"])),
                        "ScheduleDeadQueue.Arn",
                        "{name} {id}"
                    );
                    assert_eq!(text(&properties["RoleArn"]), "SchedulerRole.Arn", "{name} {id}");
                }
                "HttpApi" => assert_eq!(text(&properties["ApiId"]), "HttpApi", "{name} {id}: one origin"),
                _ => {}
            }
        }
    }
    assert!(schedules >= 7, "{schedules}");
    let api = &resources(&document, "AWS::Serverless::HttpApi")["HttpApi"];
    for limit in ["ThrottlingBurstLimit", "ThrottlingRateLimit"] {
        assert!(!text(at(api, &["DefaultRouteSettings", limit])).is_empty(), "{limit}");
    }
    let line = text(at(api, &["AccessLogSettings", "Format"]));
    assert!(line.contains("$context.routeKey") && !line.contains("$context.path"), "a path carries a callback token");
}

#[test]
fn every_alarm_tells_the_one_topic_and_has_its_page() {
    let document = document();
    let runbook = file("docs/runbook.md");
    let alarms = resources(&document, "AWS::CloudWatch::Alarm");
    let watched = |kind: &str, name: &str| {
        let mut named = Vec::new();
        for alarm in alarms.values().filter(|alarm| text(&alarm["MetricName"]) == kind) {
            texts(&alarm["Dimensions"], &mut named);
        }
        named.iter().any(|one| one.trim_end_matches(".QueueName") == name)
    };
    for (name, alarm) in &alarms {
        for action in ["AlarmActions", "OKActions"] {
            let mut told = Vec::new();
            texts(&alarm[action], &mut told);
            assert_eq!(told, ["MakesAlarmTopic", "AlarmTopic", "AlarmTopicArn"], "{name}");
        }
        let slug = text(&alarm["AlarmName"]).trim_start_matches("${AWS::StackName}-").to_owned();
        assert!(text(&alarm["AlarmDescription"]).ends_with(&format!("See docs/runbook.md#{slug}.")), "{name}");
        let page = runbook.split_once(&format!("\n## {slug}\n")).unwrap_or_else(|| panic!("{slug} has no page")).1;
        let page = page.split("\n## ").next().unwrap();
        for part in ["**What it means.**", "**Look.**", "**Do.**"] {
            assert!(page.contains(part), "{slug} lacks {part}");
        }
    }
    for (name, queue) in resources(&document, "AWS::SQS::Queue") {
        if queue.get("RedrivePolicy").is_some() {
            assert!(watched("ApproximateAgeOfOldestMessage", &name), "nobody sees that {name} waits");
        } else {
            assert!(watched("ApproximateNumberOfMessagesVisible", &name), "nobody sees what is dead on {name}");
        }
    }
    for (name, function) in resources(&document, "AWS::Serverless::Function") {
        let limit = text(&function["Timeout"]).parse::<u64>().unwrap() * 1_000;
        let slow = alarms.values().find(|alarm| {
            text(&alarm["ExtendedStatistic"]) == "p99" && text(at(&alarm["Dimensions"][0], &["Value"])) == name
        });
        let threshold: u64 = text(&slow.unwrap_or_else(|| panic!("{name} may be slow"))["Threshold"]).parse().unwrap();
        assert!(threshold * 10 >= limit * 8 && threshold < limit, "{name}: {threshold} of {limit}");
        for kind in ["FunctionErrorAlarm", "FunctionThrottleAlarm"] {
            let mut summed = Vec::new();
            texts(&alarms[kind]["Metrics"], &mut summed);
            assert!(summed.contains(&name), "{kind} leaves {name} out");
        }
    }
    let own = ["SignaturesRefused", "AttemptsStuck", "UsageMismatches"];
    for metric in own {
        assert!(alarms.values().any(|alarm| text(&alarm["MetricName"]) == metric), "{metric} rings nobody");
    }
}

#[test]
fn the_dashboard_is_json_and_shows_every_alarm() {
    let document = document();
    let body = text(&resources(&document, "AWS::CloudWatch::Dashboard")["Dashboard"]["DashboardBody"]);
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    let shown = body["widgets"][0]["properties"]["alarms"].as_array().unwrap();
    for name in resources(&document, "AWS::CloudWatch::Alarm").keys() {
        assert!(shown.contains(&serde_json::json!(format!("${{{name}.Arn}}"))), "{name} is not on the dashboard");
    }
}

#[test]
fn every_metric_of_an_alarm_or_the_dashboard_is_one_that_functions_write() {
    let metrics = file("shared/src/metrics.rs");
    let template = file("template.yaml");
    let mut named = 0;
    for (_, after) in
        template.match_indices("Trunkline/${AWS::StackName}").map(|(at, found)| (at, &template[at + found.len()..]))
    {
        // `","Name","Function"` in the dashboard, `MetricName: Name` on an alarm's next line.
        let name = after
            .strip_prefix("\",\"")
            .and_then(|rest| rest.split('"').next())
            .or_else(|| after.strip_prefix("\n      MetricName: ")?.lines().next());
        if let Some(name) = name {
            named += 1;
            assert!(metrics.contains(&format!("    {name},\n")), "no function writes {name}");
        }
    }
    assert!(named > 15, "{named}");
}

#[test]
fn every_stage_has_its_parameters_and_tags() {
    let samconfig = file("samconfig.toml");
    for stage in ["dev", "staging", "prod"] {
        let section =
            samconfig.split_once(&format!("[{stage}.deploy.parameters]")).unwrap_or_else(|| panic!("{stage}")).1;
        let section = section.split("\n[").next().unwrap();
        let tagged = [format!("Stage={stage}"), format!("stage={stage}")];
        for wanted in tagged.iter().map(String::as_str).chain(["CAPABILITY_IAM", "resolve_s3 = true"]) {
            assert!(section.contains(wanted), "{stage} lacks {wanted}");
        }
    }
    assert!(samconfig.contains("[prod.deploy.parameters]\nconfirm_changeset = true"), "production asks first");
}

#[test]
fn every_variable_and_parameter_has_its_line_in_the_page_of_the_environment() {
    let document = document();
    let page = file("docs/environment.md");
    let variables_of = |yaml: &Yaml| -> Vec<String> {
        at(yaml, &["Environment", "Variables"]).as_mapping().into_iter().flat_map(|map| map.keys().map(text)).collect()
    };
    let mut names = variables_of(&document["Globals"]["Function"]);
    for function in resources(&document, "AWS::Serverless::Function").values() {
        names.extend(variables_of(function));
    }
    names.extend(document["Parameters"].as_mapping().unwrap().keys().map(text));
    assert!(names.len() > 20, "{names:?}");
    names.retain(|name| !page.contains(&format!("`{name}`")));
    assert!(names.is_empty(), "docs/environment.md does not name {names:?}");
}
