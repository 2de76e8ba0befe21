//! `usage-metering`: what is counted.

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    shared::trigger::run(usage_metering::Metering::new).await
}
