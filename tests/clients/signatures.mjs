// The providers' own libraries: what they sign, and what they say of signatures.
// TRUNKLINE in the environment is {"secret", "bodies": {provider: text}, "signed": {"razorpay": [{"signature", "body"}]}}.

import razorpay from 'razorpay/dist/utils/razorpay-utils.js';
import { createSHA256HMAC } from '@shopify/shopify-api/runtime';
import Stripe from 'stripe';

const { secret, bodies, signed } = JSON.parse(process.env.TRUNKLINE);
const stripe = new Stripe('sk_test_unused');

console.log(
  JSON.stringify({
    stripe: stripe.webhooks.generateTestHeaderString({ payload: bodies.stripe, secret }),
    // Over bytes that are not all ASCII, and base64, which is its default.
    shopify: await createSHA256HMAC(secret, bodies.shopify),
    razorpay: signed.razorpay.map(({ body, signature }) => razorpay.validateWebhookSignature(body, signature, secret)),
  }),
);
