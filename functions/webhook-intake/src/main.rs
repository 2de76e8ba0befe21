//! `webhook-intake`: what the outside world tells us.

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    shared::trigger::run(webhook_intake::Intake::new).await
}
