use super::*;
use serde_json::json;

mod rules;

/// The project's own template: the local stack depends on every word of this.
fn ours() -> Template {
    Template::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../template.yaml")).unwrap()
}

#[test]
fn our_queues_have_dead_letters_and_rest_for_six_timeouts() {
    let template = ours();
    let names: Vec<_> = template.queues.iter().map(|queue| queue.name.as_str()).collect();
    let wanted = ["intake", "recording", "dial", "usage", "event"]
        .map(|name| [format!("trunkline-{name}"), format!("trunkline-{name}-dead")]);
    // The slow share the dead letters of the fast; ticks that were lost are nobody's messages.
    let besides = ["trunkline-event-slow", "trunkline-schedule-dead"];
    let (those, others): (Vec<&str>, Vec<&str>) = names.into_iter().partition(|name| besides.contains(name));
    assert_eq!(others, wanted.as_flattened());
    assert_eq!(those, besides);
    for function in &template.functions {
        for event in &function.sqs_events {
            let queue = template.queue(&event.queue).unwrap();
            assert!(queue.visibility_timeout >= function.timeout * 6, "{}", queue.name);
            assert!(event.report_batch_item_failures, "{}", queue.name);
            let expected = match queue.logical_id.as_str() {
                // Each recording has a whole invocation to be copied in.
                "RecordingQueue" => (1, Some(5)),
                // Deliveries wait for whoever is told, so that more of them are under way.
                "EventQueue" => (10, Some(20)),
                // An organization's events count one after the other anyhow.
                "UsageQueue" => (10, Some(2)),
                _ => (10, Some(10)),
            };
            assert_eq!((event.batch_size, event.maximum_concurrency), expected);
            let redrive = queue.redrive.as_ref().unwrap();
            assert!(redrive.max_receive_count >= 5);
            let dead = template.queue(&redrive.target).unwrap();
            assert_eq!(dead.message_retention, Duration::from_secs(14 * 86_400));
            assert!(dead.message_retention > queue.message_retention);
        }
    }
}

#[test]
fn our_functions_have_their_routes_schedules_and_variables() {
    let template = ours();
    let packages: Vec<_> = template.functions.iter().map(|function| function.package.as_str()).collect();
    assert_eq!(packages, ["webhook-intake", "call-dispatch", "usage-metering", "invoice-generation", "event-delivery"]);
    for function in &template.functions {
        let path = format!("/functions/v1/{}/{{proxy+}}", function.package);
        assert_eq!(function.routes, [Route { method: "ANY".to_owned(), path }]);
        for name in ["SUPABASE_URL", "SUPABASE_PUBLISHABLE_KEY", "PUBLIC_ORIGIN", "SECRET_ARN", "LOG_LEVEL"] {
            assert!(function.environment.contains_key(name), "{} lacks {name}", function.package);
        }
    }
    // A document connects the agent, and at Telnyx the request for the call does.
    for name in ["webhook-intake", "call-dispatch"] {
        let agents = &template.function(name).unwrap().environment["AGENT_ORIGINS"];
        assert_eq!(*agents, Value::Ref("AgentOrigins".to_owned()), "{name}");
    }
    let dispatch = template.function("call-dispatch").unwrap();
    assert_eq!(dispatch.timeout, Duration::from_secs(30));
    assert_eq!(dispatch.environment["DIAL_QUEUE_URL"], Value::Ref("DialQueue".to_owned()));
    assert_eq!(template.resolve(&dispatch.environment["LOG_LEVEL"]).as_deref(), Some("info"));
    assert_eq!(template.resolve(&dispatch.environment["SUPABASE_URL"]), None);
    let jobs: Vec<_> = dispatch.schedules.iter().map(|schedule| (schedule.input.clone(), schedule.rate)).collect();
    let minute = Duration::from_secs(60);
    let expected = [("release", minute), ("reconcile", minute), ("records", 10 * minute)];
    assert_eq!(jobs, expected.map(|(job, every)| (json!({ "job": job }), every)));
    let invoices = template.function("invoice-generation").unwrap();
    assert_eq!(invoices.schedules[0].rate, Duration::from_secs(3_600));
}

#[test]
fn both_spellings_of_a_reference_are_one() {
    let template = Template::parse(
        r#"
Parameters: {Size: {Type: Number, Default: 7}}
Resources:
  Dead: {Type: AWS::SQS::Queue, Properties: {QueueName: {"Fn::Sub": "${AWS::StackName}-dead"}}}
  Live:
    Type: AWS::SQS::Queue
    Properties:
      QueueName: !Sub "live-${Size}"
      VisibilityTimeout: {Ref: Size}
      RedrivePolicy: {deadLetterTargetArn: {"Fn::GetAtt": [Dead, Arn]}, maxReceiveCount: 3}
"#,
    )
    .unwrap();
    let live = template.queue("Live").unwrap();
    assert_eq!((live.name.as_str(), live.visibility_timeout), ("live-7", Duration::from_secs(7)));
    assert_eq!(live.redrive, Some(Redrive { target: "Dead".to_owned(), max_receive_count: 3 }));
    assert_eq!(template.queue("Dead").unwrap().name, "trunkline-dead");
}

#[test]
fn what_could_not_be_honoured_is_an_error_that_names_its_place() {
    let with_event = |event: &str| {
        let text = format!(
            "Resources:\n  F:\n    Type: AWS::Serverless::Function\n    Properties:\n      CodeUri: functions/f\n      Events:\n        E: {event}\n"
        );
        format!("{:#}", Template::parse(&text).unwrap_err())
    };
    let cron = with_event("{Type: ScheduleV2, Properties: {ScheduleExpression: cron(0 1 * * ? *)}}");
    assert!(cron.contains("F: Events.E") && cron.contains("cron"), "{cron}");
    let kinesis = with_event("{Type: Kinesis, Properties: {}}");
    assert!(kinesis.contains("Kinesis"), "{kinesis}");
}

#[test]
fn a_rate_is_a_number_and_a_unit() {
    assert_eq!(rate("rate(1 minute)").unwrap(), Duration::from_secs(60));
    assert_eq!(rate("rate(12 hours)").unwrap(), Duration::from_secs(43_200));
    for wrong in ["rate(0 minutes)", "rate(minute)", "rate(5 fortnights)", "at(2026-01-01T00:00:00)"] {
        assert!(rate(wrong).is_err(), "{wrong}");
    }
}
