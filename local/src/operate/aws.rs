//! The few questions that are asked of AWS: what a stack gave out, and what its secret holds.

use anyhow::{Context, Result, ensure};
use aws_config::SdkConfig;
use aws_credential_types::provider::ProvideCredentials;
use aws_sigv4::{
    http_request::{SignableBody, SignableRequest, SigningSettings, sign},
    sign::v4,
};
use aws_smithy_http_client::{
    Builder,
    tls::{self, rustls_provider::CryptoMode},
};
use std::{collections::BTreeMap, time::SystemTime};
use url::Url;

/// Region and credentials as every AWS tool finds them: environment, profile, or the machine's role.
pub async fn config() -> SdkConfig {
    let http = Builder::new().tls_provider(tls::Provider::Rustls(CryptoMode::Ring)).build_https();
    aws_config::defaults(aws_config::BehaviorVersion::latest()).http_client(http).load().await
}

/// What a CloudFormation stack gave out, by name.
pub async fn outputs(config: &SdkConfig, stack: &str, endpoint: Option<&Url>) -> Result<BTreeMap<String, String>> {
    let body = form_urlencoded::Serializer::new(String::new())
        .append_pair("Action", "DescribeStacks")
        .append_pair("Version", "2010-05-15")
        .append_pair("StackName", stack)
        .finish();
    let headers = [("content-type", "application/x-www-form-urlencoded; charset=utf-8")];
    let answer = ask(config, "cloudformation", endpoint, &headers, body).await?;
    read_outputs(&answer).with_context(|| format!("the outputs of {stack}"))
}

fn read_outputs(xml: &str) -> Result<BTreeMap<String, String>> {
    let document = roxmltree::Document::parse(xml).context("CloudFormation's answer")?;
    let child = |output: roxmltree::Node<'_, '_>, name: &str| {
        output
            .children()
            .find(|child| child.tag_name().name() == name)
            .and_then(|child| child.text().map(str::to_owned))
    };
    let outputs = document.descendants().filter(|node| node.tag_name().name() == "Outputs");
    let members = outputs.flat_map(|outputs| outputs.children().filter(|node| node.tag_name().name() == "member"));
    Ok(members.filter_map(|member| Some((child(member, "OutputKey")?, child(member, "OutputValue")?))).collect())
}

/// What a secret of Secrets Manager holds.
pub async fn secret(config: &SdkConfig, arn: &str, endpoint: Option<&Url>) -> Result<serde_json::Value> {
    let headers = [("content-type", "application/x-amz-json-1.1"), ("x-amz-target", "secretsmanager.GetSecretValue")];
    let body = serde_json::json!({ "SecretId": arn }).to_string();
    let answer = ask(config, "secretsmanager", endpoint, &headers, body).await?;
    let answer: serde_json::Value = serde_json::from_str(&answer).context("the answer of Secrets Manager")?;
    let text = answer["SecretString"].as_str().context("the secret has no text")?;
    serde_json::from_str(text).context("the stack's secret is no JSON")
}

async fn ask(
    config: &SdkConfig,
    service: &str,
    endpoint: Option<&Url>,
    headers: &[(&'static str, &'static str)],
    body: String,
) -> Result<String> {
    let region = config.region().context("no AWS region: set AWS_REGION")?.to_string();
    let credentials = config.credentials_provider().context("no AWS credentials")?.provide_credentials().await;
    let identity = credentials.context("no AWS credentials")?.into();
    let url = match endpoint {
        Some(url) => url.clone(),
        None => Url::parse(&format!("https://{service}.{region}.amazonaws.com/"))?,
    };
    let parameters = v4::SigningParams::builder()
        .identity(&identity)
        .region(&region)
        .name(service)
        .time(SystemTime::now())
        .settings(SigningSettings::default())
        .build()?
        .into();
    let signable =
        SignableRequest::new("POST", url.as_str(), headers.iter().copied(), SignableBody::Bytes(body.as_bytes()))?;
    let (instructions, _) = sign(signable, &parameters)?.into_parts();
    let mut request = shared::supabase::http_client()?.post(url).body(body);
    for (name, value) in headers.iter().copied().chain(instructions.headers()) {
        request = request.header(name, value);
    }
    let answer = request.send().await.with_context(|| format!("{service} does not answer"))?;
    let status = answer.status();
    let text = answer.text().await?;
    ensure!(status.is_success(), "{service} answered {status}: {}", text.chars().take(300).collect::<String>());
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_read_by_name() {
        let answer = r#"<DescribeStacksResponse xmlns="http://cloudformation.amazonaws.com/doc/2010-05-15/"><DescribeStacksResult><Stacks><member>
            <StackName>trunkline</StackName><Parameters><member><ParameterKey>Stage</ParameterKey><ParameterValue>prod</ParameterValue></member></Parameters>
            <Outputs>
              <member><OutputKey>FunctionsUrl</OutputKey><OutputValue>https://api.example.com/functions/v1</OutputValue></member>
              <member><OutputKey>SecretArn</OutputKey><Description>d</Description><OutputValue>arn:aws:x</OutputValue></member>
            </Outputs></member></Stacks></DescribeStacksResult></DescribeStacksResponse>"#;
        let outputs = read_outputs(answer).unwrap();
        assert_eq!(outputs["FunctionsUrl"], "https://api.example.com/functions/v1");
        assert_eq!((outputs["SecretArn"].as_str(), outputs.len()), ("arn:aws:x", 2));
        assert!(read_outputs("<html>").is_err());
    }
}
