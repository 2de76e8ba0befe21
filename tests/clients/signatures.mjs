// The providers' own libraries: what they sign, and what they say of signatures.
// TRUNKLINE in the environment is {"secret", "bodies": {provider: text}, "signed": {"razorpay": [{"signature", "body"}]},
// "standard": {"secret", "id", "body", "signed": [{"headers", "body"}]}}.

import razorpay from 'razorpay/dist/utils/razorpay-utils.js';
import { createSHA256HMAC } from '@shopify/shopify-api/runtime';
import { Webhook } from 'standardwebhooks';
import Stripe from 'stripe';

const { secret, bodies, signed, standard } = JSON.parse(process.env.TRUNKLINE);
const stripe = new Stripe('sk_test_unused');

const webhook = new Webhook(standard.secret);
const now = new Date();

function isVerified({ headers, body }) {
  try {
    webhook.verify(body, headers);
    return true;
  } catch {
    return false;
  }
}

console.log(
  JSON.stringify({
    stripe: stripe.webhooks.generateTestHeaderString({ payload: bodies.stripe, secret }),
    // Over bytes that are not all ASCII, and base64, which is its default.
    shopify: await createSHA256HMAC(secret, bodies.shopify),
    razorpay: signed.razorpay.map(({ body, signature }) => razorpay.validateWebhookSignature(body, signature, secret)),
    standard: {
      timestamp: Math.floor(now.getTime() / 1000).toString(),
      signature: webhook.sign(standard.id, now, standard.body),
      verified: standard.signed.map(isVerified),
    },
  }),
);
