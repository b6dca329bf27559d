package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/trust"
)

func newKey(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Make keys that sign indexes",
		Long: `Make keys that sign indexes. shale index --push --key FILE signs with the private
key. Nodes that have the public one in their configuration,

  {"index_trust": "signed", "index_keys": ["/etc/shale/keys/team.pub"]}

start lazily by an index that is signed, and refuse one that somebody else has
put in its place. Keys are Ed25519 in PEM files, as openssl has them.`,
		Example: `  shale key new team`,
		Args:    args(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	create := &cobra.Command{
		Use:   "new FILE",
		Short: "Make a key: FILE is the private one, FILE.pub the public one",
		Long: `Make a key. FILE is the private one, which nobody else may read; FILE.pub is the
public one. Neither may be there yet. With --json: {key, private, public}; key is
the id by which indexes name it.`,
		Example: `  shale key new team`,
		Args:    args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			s, err := trust.Create(a[0])
			if err != nil {
				return err
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), struct {
					Key     string `json:"key"`
					Private string `json:"private"`
					Public  string `json:"public"`
				}{s.ID(), a[0], a[0] + ".pub"})
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "key %s\nprivate in %s, public in %s.pub\n", s.ID(), quote(a[0]), quote(a[0]))
			return err
		},
	}
	g.jsonFlag(create)
	cmd.AddCommand(create)
	return cmd
}
