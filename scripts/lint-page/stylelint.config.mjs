// The style of dashboard.html: stylelint's standard.
export default {
  extends: 'stylelint-config-standard',
  customSyntax: 'postcss-html',
  rules: {
    'media-feature-range-notation': 'prefix', // (width <= 680px) is unknown to Safari 16.0 to 16.3, which telephones have
  },
};
